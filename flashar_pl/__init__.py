"""FlashAR in PyTorch Lightning: see docs/method.md for the method and README.md for use."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """FlashARPipeline, imported when it is asked for: the package alone imports no torch."""
    if name == "FlashARPipeline":
        return resolve_name("flashar_pl.pipeline:FlashARPipeline")
    raise AttributeError(f"module 'flashar_pl' has no attribute {name!r}")
