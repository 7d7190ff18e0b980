"""Warnings of libraries about their own calls of each other, which tests must not fail for."""

from __future__ import annotations

import pytest

LIBRARY_WARNINGS = [
    # lm-eval, datasets and transformers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
