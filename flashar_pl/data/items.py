"""Samples of a source, read and prepared by worker processes, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from flashar_pl.data.loader import read_ahead
from flashar_pl.data.sources import Source
from flashar_pl.image_files import Unreadable

READ = 8
"""Samples a worker process sends at once."""


Prepared = np.ndarray | tuple[np.ndarray, np.ndarray]
"""An array of a sample, or its codes and those of its preview."""


@dataclass
class Item:
    """One sample as a worker sends it."""

    index: int
    array: np.ndarray | None
    """What `prepare` made of it; None if it is unreadable."""
    condition: int | str
    problem: str = ""
    preview: np.ndarray | None = None
    """Codes of a smaller version, where `prepare` found them."""


@dataclass
class Items(Dataset):
    """[numbers of samples] -> [Item]."""

    source: Source
    prepare: Callable[[bytes], Prepared]

    def __getitem__(self, numbers: list[int]) -> list[Item]:
        return [self.read(number) for number in numbers]

    def read(self, number: int) -> Item:
        """One sample, or the reason why it cannot be read."""
        try:
            data, condition = self.source.read(number)
            found = self.prepare(data)
            array, preview = found if isinstance(found, tuple) else (found, None)
            return Item(number, array, condition, preview=preview)
        except Unreadable as error:
            return Item(number, None, -1, str(error))

    def each(self, parts: list[np.ndarray], workers: int) -> Iterator[Item]:
        """The samples of some parts, each an array (n,) of numbers, one after the other."""
        groups = [group.tolist() for part in parts for group in np.split(part, range(READ, len(part), READ))]
        if not groups:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*worker processes in total")  # as --workers says
            read = read_ahead(self, groups, workers)
        for group in read:
            yield from group
