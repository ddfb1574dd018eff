"""Loaders of the exact way of reading: worker processes compute batches, the loader holds the place in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from flashar_pl.data.batches import EvaluationBatches, GridEvaluation, GridTraining, TrainingBatches
from flashar_pl.data.order import check_cut
from flashar_pl.data.pixels import ImageBatches

PlacedBatches = TrainingBatches | GridTraining | ImageBatches
"""(epoch, g) -> this rank's part of global training batch g, with its `order`, `ranks` and `identity()`."""


class Cursor:
    """Place in the training data: the next global batch is `position` of `epoch`. Iterating yields what is left."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, g) for g in range(self.position, self.batches))

    def __len__(self) -> int:
        return self.batches - self.position


class Loader:
    """Hands out batches read by worker processes, which live for one pass.

    It is no torch `DataLoader`, so a Trainer does not replace its sampler: the data is cut over ranks already.
    """

    def __init__(self, batches: Any, sampler: Any, num_workers: int) -> None:
        self._loader: DataLoader = DataLoader(
            batches,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_is,
            # Its own generator: else each pass draws from the global one, and a resumed run would see other dropout.
            generator=torch.Generator(),
        )


class TrainingLoader(Loader):
    """Training batches with a place that is saved and restored exactly.

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
        self, batches: PlacedBatches, num_workers: int = 0, processed: Callable[[], int] | None = None
    ) -> None:
        check_cut(batches.order.batch_size, batches.ranks)
        self.batches = batches
        self.cursor = Cursor(len(batches))
        self._processed = processed
        super().__init__(batches, self.cursor, num_workers)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the cursor stands."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # A generator starts at the first `next`, when the Trainer has restored its progress.
        cursor = self.cursor
        cut_short = self._processed is not None and self._processed() == 0 < cursor.position
        if cut_short or cursor.position >= len(self):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        for batch in self._loader:
            cursor.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it is a place in. Plain integers and strings."""
        position = self.cursor.position
        if self._processed is not None:
            position = min(position, self._processed())
        return {"epoch": self.cursor.epoch, "position": position} | self.batches.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            ValueError: in the middle of an epoch, if the order there was that of other data or settings.
        """
        own = self.batches.identity()
        if "reading" in state:
            own = {"reading": "exact"}
        changed = [name for name, value in own.items() if state[name] != value]
        if changed and state["position"] > 0:
            name = changed[0]
            raise ValueError(
                f"The checkpoint stands at batch {state['position']} of epoch {state['epoch']} of an order with "
                f"{name}={state[name]!r}; this run has {name}={own[name]!r}, so it cannot continue "
                f"there. Resume with the old {name}, or start a new run from the checkpoint's weights."
            )
        self.cursor.epoch, self.cursor.position = state["epoch"], state["position"]


class EvaluationLoader(Loader):
    """Evaluation batches, the same ones in every pass."""

    def __init__(self, batches: EvaluationBatches | GridEvaluation, num_workers: int = 0) -> None:
        check_cut(batches.batch_size, batches.ranks)
        self.batches = batches
        super().__init__(batches, range(len(batches)), num_workers)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self._loader


def _as_is(batch: Any) -> Any:
    return batch
