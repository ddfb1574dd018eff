"""The form of what a manifest says, checked before any of it is used: a manifest may come from anywhere.

Each check returns the value, or raises ValueError with what was found and what was expected.
"""

from __future__ import annotations

import re
from typing import Any

SIZE = 1 << 50
"""Largest number of bytes or samples."""
SIDE = 1 << 16
"""Largest side of a grid, number of crops, text length and feature width."""
IDS = 1 << 31
"""Largest vocabulary."""
CLASSES = 1 << 24
"""Largest number of classes."""
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE = re.compile(r"\w[\w .+=,@-]{0,200}")


def shown(value: Any) -> str:
    """A value for an error, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(what: str, value: Any, low: int, high: int) -> int:
    """An integer from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}; expected {low} .. {high}.")
    return value


def name(what: str, value: Any) -> str:
    """Up to 200 printable characters."""
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= 200:
        raise ValueError(f"{what} is {shown(value)}; expected a name of 1 to 200 printable characters.")
    return value


def sha256(what: str, value: Any) -> str:
    """A SHA-256 in lower-case hexadecimal."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{what} is {shown(value)}; expected a SHA-256: 64 hexadecimal digits in lower case.")
    return value


def file_name(what: str, value: Any) -> str:
    """The name of a file beside the manifest: no folder, and nothing that a URL or a shell gives a meaning."""
    if isinstance(value, str) and _FILE.fullmatch(value):
        return value
    leaves = isinstance(value, str) and ("/" in value or "\\" in value or value in ("", ".", ".."))
    found = "leaves the directory of the manifest" if leaves else "is no plain name"
    raise ValueError(f"{what} {shown(value)} {found}; expected a name such as train-000000.tar.")
