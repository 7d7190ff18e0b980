"""Texts without the credentials that people write into study files and libraries into errors."""

from __future__ import annotations

import re

_KEY = r"(?:token|password|secret|api[_-]?key)"
_SECRETS = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1"),  # user:password@ in addresses
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
    # A line of YAML, to its end: a value may hold anything.
    (
        re.compile(rf"(?im)^(\s*(?:- +)*[\"']?[\w-]*{_KEY}[\"']?\s*:\s*)\S.*$"),
        r"\1'***'",
    ),
    # Inside a line: flow style, JSON, ``key=value`` and the query of an address.
    (
        re.compile(
            rf"(?i)({_KEY}[\"']?\s*[:=]\s*)"
            r"(?:\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s,;}\])&'\"]+)"
        ),
        r"\1'***'",
    ),
)


def redacted(text: str) -> str:
    """Return ``text`` without credentials: everybody who can open MLflow can read it."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
