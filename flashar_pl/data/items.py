"""Samples of a source, read and prepared by worker processes, in order.

Shapes: n samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flashar_pl.data.images import Unreadable
from flashar_pl.data.sources import Source

READ = 8
"""Samples a worker process sends at once."""


@dataclass
class Item:
    """One sample as a worker sends it."""

    index: int
    array: np.ndarray | None
    """What `prepare` made of it; None if it is unreadable."""
    condition: int | str
    problem: str = ""


def read_items(
    source: Source, prepare: Callable[[bytes], np.ndarray], parts: list[np.ndarray], workers: int
) -> Iterator[Item]:
    """The samples of some parts, each an array (n,) of numbers, one after the other."""
    groups = [group.tolist() for part in parts for group in np.split(part, range(READ, len(part), READ))]
    if not groups:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total")  # as --workers says
        loader = DataLoader(
            _Reading(source, prepare),
            sampler=groups,
            batch_size=None,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        read = iter(loader)
    for group in read:
        yield from group


@dataclass
class _Reading(Dataset):
    """[numbers of samples] -> [Item], in a worker process."""

    source: Source
    prepare: Callable[[bytes], np.ndarray]

    def __getitem__(self, numbers: list[int]) -> list[Item]:
        return [read_item(self.source, self.prepare, number) for number in numbers]


def read_item(source: Source, prepare: Callable[[bytes], np.ndarray], number: int) -> Item:
    """One sample, or the reason why it cannot be read."""
    try:
        data, condition = source.read(number)
        return Item(number, prepare(data), condition)
    except Unreadable as error:
        return Item(number, None, -1, str(error))
