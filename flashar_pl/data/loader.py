"""Loaders of batches: a pure function from (epoch, global batch) to a `Batch`, run by worker processes.

Because a batch is a function of two integers, workers hold no state, and the place in the data is two integers too.

Shapes: b samples of a rank's slice of a global batch, H x W grid, T text length, C feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flashar_pl.backbones.condition import Batch, ClassIds, Condition, Prompts, TextFeatures
from flashar_pl.data.order import EvaluationOrder, TrainingOrder, check_cut
from flashar_pl.data.reader import Samples, ShardReader

if TYPE_CHECKING:
    from flashar_pl.data.grids import GridEvaluation, GridTraining

TextEncoder = Callable[[str], Tensor]
"""Caption -> 1-D int64 token ids, the whole prefix of the sample."""


def to_batch(
    samples: Samples, index: np.ndarray, valid: np.ndarray | None = None, text_encoder: TextEncoder | None = None
) -> Batch:
    """A `Batch` of CPU tensors from `samples` (b); `index` (b,) int64, `valid` (b,) bool."""
    condition: Condition
    if samples.labels is not None:
        condition = ClassIds(torch.from_numpy(samples.labels))
    elif samples.features is not None:
        assert samples.mask is not None
        condition = TextFeatures(torch.from_numpy(samples.features), torch.from_numpy(samples.mask))
    else:
        assert samples.texts is not None
        assert text_encoder is not None
        condition = Prompts(text_encoder(text) for text in samples.texts)
    return Batch(
        codes=torch.from_numpy(samples.codes),
        condition=condition,
        valid=None if valid is None else torch.from_numpy(valid),
        index=torch.from_numpy(index),
    )


@dataclass
class TrainingBatches(Dataset):
    """(epoch, g) -> this rank's part of global training batch g. `Batch.valid` is None: every row counts."""

    reader: ShardReader
    order: TrainingOrder
    rank: int = 0
    ranks: int = 1
    text_encoder: TextEncoder | None = None
    reshuffle: bool = True
    """False: every epoch is epoch 0."""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def batch_size(self) -> int:
        """Global batch, over all ranks."""
        return self.order.batch_size

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        return {
            "batch_size": self.order.batch_size,
            "seed": self.order.seed,
            "window": self.order.window,
            "shards": self.reader.manifest.fingerprint(self.reader.split),
        }

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, g = item
        if not self.reshuffle:
            epoch = 0
        index = self.order.batch(epoch, g, self.rank, self.ranks)
        crops = self.order.crops(epoch, index, self.reader.manifest.crops)
        return to_batch(self.reader.read(index, crops), index, None, self.text_encoder)


@dataclass
class EvaluationBatches(Dataset):
    """g -> this rank's part of global evaluation batch g, evaluation crops; `Batch.valid` is always set."""

    reader: ShardReader
    order: EvaluationOrder
    rank: int = 0
    ranks: int = 1
    text_encoder: TextEncoder | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def batch_size(self) -> int:
        """Global batch, over all ranks."""
        return self.order.batch_size

    def __getitem__(self, g: int) -> Batch:
        index, valid = self.order.batch(g, self.rank, self.ranks)
        return to_batch(self.reader.read(index), index, valid, self.text_encoder)


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
    """Hands out batches read by worker processes that live as long as the loader.

    It is no torch `DataLoader`, so a Trainer does not replace its sampler: the data is cut over ranks already.
    """

    def __init__(self, batches: Dataset, sampler: Any, num_workers: int) -> None:
        self._loader = DataLoader(
            batches,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_is,
            persistent_workers=num_workers > 0,
            # Its own generator: else each pass draws from the global one, and a resumed run would see other dropout.
            generator=torch.Generator(),
        )

    @property
    def _iterator(self) -> Any:
        """The running workers. A Trainer looks for this name to stop them, after an exception too."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def close(self) -> None:
        """Stop the workers. Left to the garbage collector, each may take five seconds."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None


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
        self,
        batches: TrainingBatches | GridTraining,
        num_workers: int = 0,
        processed: Callable[[], int] | None = None,
    ) -> None:
        check_cut(batches.batch_size, batches.ranks)
        self.batches = batches
        self.cursor = Cursor(len(batches))
        self._processed = processed
        super().__init__(batches, self.cursor, num_workers)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the cursor stands."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
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

    def __iter__(self) -> Iterator[Batch]:
        yield from self._loader


def _as_is(batch: Any) -> Any:
    return batch
