"""Loaders of the exact way of reading: worker processes compute batches, the loader holds the place in the data.

They are no torch `DataLoader`, so a Trainer does not replace their sampler: the data is cut over ranks already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from flashar_pl.data.batches import EvaluationBatches, TrainingBatches
from flashar_pl.data.pixels import ImageBatches


def read_ahead(data: Dataset, items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """data[item] of each item, in that order, by worker processes that live for this one pass; 0 reads in this one."""
    # Its own generator: else each pass draws from the global one, and a resumed run would see other dropout.
    loader = DataLoader(data, sampler=items, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    return without_worker(iter(loader))


def without_worker(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a wrong input found by a worker is told as if this process had found it, in one line.

    torch puts the worker's traceback into the message; it stays there as the cause.
    """
    try:
        yield from batches
    except (ValueError, OSError) as error:
        _, worker, trace = str(error).partition("\nOriginal Traceback")
        if not worker:
            raise
        raise type(error)(trace.rpartition(f"\n{type(error).__name__}: ")[2].strip()) from error


class TrainingLoader:
    """Training batches with a place that is saved and restored exactly: the next one is `position` of `epoch`.

    One pass of the iterator is the rest of an epoch; when none is left, the next epoch. The loader counts epochs
    itself: after a run that stopped within an epoch, the Trainer's own count is one ahead of the data. The state
    counts batches handed out, never those prefetched by workers.

    Args:
        batches: what to load.
        num_workers: worker processes; 0 loads in this process.
        processed: gives the number of batches of this epoch that training has finished. The state never runs ahead
            of it, so a batch that failed half-way is drawn again; and a pass that starts at 0 starts an epoch, even
            if the one before was cut short. None = trust the count of batches handed out.
    """

    def __init__(
        self,
        batches: TrainingBatches | ImageBatches,
        num_workers: int = 0,
        processed: Callable[[], int] | None = None,
    ) -> None:
        self.batches, self.num_workers, self._processed = batches, num_workers, processed
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the loader stands."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # A generator starts at the first `next`, when the Trainer has restored its progress.
        cut_short = self._processed is not None and self._processed() == 0 < self.position
        if cut_short or self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        left = [(self.epoch, g) for g in range(self.position, len(self))]
        for batch in read_ahead(self.batches, left, self.num_workers):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it is a place in. Plain integers and strings."""
        position = self.position if self._processed is None else min(self.position, self._processed())
        return {"epoch": self.epoch, "position": position} | self.batches.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            ValueError: in the middle of an epoch, if the order there was that of other data or settings.
        """
        own = {"reading": "exact"} if "reading" in state else self.batches.identity()
        changed = [name for name, value in own.items() if state.get(name) != value]
        if changed and state["position"] > 0:
            name = changed[0]
            raise ValueError(
                f"The checkpoint stands at batch {state['position']} of epoch {state['epoch']} of an order with "
                f"{name}={state.get(name)!r}; this run has {name}={own[name]!r}, so it cannot continue "
                f"there. Resume with the old {name}, or start a new run from the checkpoint's weights."
            )
        self.epoch, self.position = state["epoch"], state["position"]


class EvaluationLoader:
    """Evaluation batches, the same ones in every pass."""

    def __init__(self, batches: EvaluationBatches, num_workers: int = 0) -> None:
        self.batches, self.num_workers = batches, num_workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return read_ahead(self.batches, range(len(self)), self.num_workers)
