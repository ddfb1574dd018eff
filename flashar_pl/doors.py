"""Functions found by name when they are called, so that a lower room can offer what a higher one does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def door(target: str) -> Callable[..., Any]:
    """The function "module:function", imported now. For constructors that read files, and for verbs of the command."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
