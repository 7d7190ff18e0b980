"""mergekit's geometric methods on our configurations, and how far they are from our tensors.

With EVOMERGE_PARITY_TABLE=<file> the measured differences are written there as Markdown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evomerge.layout import partition
from evomerge.merge.methods import METHODS
from evomerge.merge.writer import write_checkpoint
from evomerge.mergekit_yaml import mergekit_config
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe
from tests.integration.test_mergekit import EXPERTS, PYTHON, run_mergekit, save_pool
