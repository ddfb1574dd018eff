"""Silence while torchao is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Hides the warnings of importing torchao (peft does it too): kernels for other devices that do not load, and a
    deprecated call of its own. Errors still show."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
