"""WebDataset shards of codes, and tars of images: manifest, sample order, reader, DataModules, tokenising.

The DataModules are here too, read when asked for: `from flashar_pl.data import ImageNetDataModule`.
"""

from importlib import import_module
from typing import Any

__all__ = ["CodesDataModule", "ImageNetDataModule", "TextImageDataModule"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("flashar_pl.data.datamodules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
