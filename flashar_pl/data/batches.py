"""Batches of codes as pure functions: (epoch, global batch) -> this rank's part of it.

So worker processes hold no state, and the place in the data is two integers too. Several data sets of one tokenizer,
one for each grid (`flashar tokenize text-image` writes OUT/32x32, OUT/27x36, ...), are one here: a global batch is of
one grid on every rank.

Shapes: b samples of a rank's slice of a global batch, H x W grid, T text length, C feature width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashar_pl.backbones.condition import Batch, ClassIds, Condition, Prompts, TextFeatures
from flashar_pl.data.manifest import Manifest
from flashar_pl.data.order import EvaluationOrder, GridOrder, MixtureOrder, Order, TrainingOrder, stream
from flashar_pl.data.reader import Samples, ShardReader

TextEncoder = Callable[[str], Tensor]
"""Caption -> 1-D int64 token ids, the whole prefix of the sample."""
EncoderOf = Callable[[Manifest], TextEncoder | None]
"""What turns the captions of a data set into token ids; None where it has none."""


def to_batch(
    samples: Samples,
    index: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    text_encoder: TextEncoder | None = None,
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
        index=None if index is None else torch.from_numpy(index),
        previews=None if samples.previews is None else torch.from_numpy(samples.previews),
    )


@dataclass(frozen=True)
class Cut:
    """What the batches of all splits have in common."""

    rank: int = 0
    ranks: int = 1
    encoder: EncoderOf = lambda manifest: None
    cache: str | None = None
    """Of remote shards; None = the user's cache directory."""
    verify: bool = True
    """Compare each shard with its hash before its first use."""

    def reader(self, manifest: Manifest, split: str) -> ShardReader:
        """The reader of a split."""
        return ShardReader(manifest, split, self.cache, self.verify)


@dataclass
class Grid(Generic[Order]):
    """A split of one data set, and the order in which it is shown."""

    reader: ShardReader
    order: Order
    text_encoder: TextEncoder | None
    offset: int
    """Samples of the grids before it: `Batch.index` counts through all of them."""

    def batch(self, index: np.ndarray, crops: np.ndarray | None = None, valid: np.ndarray | None = None) -> Batch:
        """The samples `index` (b,) of this grid."""
        return to_batch(self.reader.read(index, crops), index + self.offset, valid, self.text_encoder)


class TrainingGrid(Grid[TrainingOrder]):
    """A training split."""

    def read(self, epoch: int, index: np.ndarray) -> Samples:
        """The samples `index` (b,) with the crops of an epoch."""
        self.reader.verify_ahead()
        return self.reader.read(index, self.order.crops(epoch, index, self.reader.manifest.crops))

    def training_batch(self, epoch: int, g: int, rank: int, ranks: int) -> Batch:
        """A rank's part of this grid's batch g."""
        index = self.order.batch(epoch, g, rank, ranks)
        return to_batch(self.read(epoch, index), index + self.offset, text_encoder=self.text_encoder)

    @property
    def identity(self) -> str:
        """Its shape and what it holds."""
        manifest = self.reader.manifest
        return f"{manifest.grid[0]}x{manifest.grid[1]} {manifest.fingerprint('train')}"


@dataclass
class MixedGrid:
    """The training samples that several sources have of one grid, in the proportions of a mixture."""

    sources: dict[int, TrainingGrid]
    """Number of the source in the mixture -> its samples of this grid."""
    order: MixtureOrder
    mixed: int
    """K, sources of the mixture, those without this grid included."""
    weights: str
    """Of the sources, as they were given."""

    def training_batch(self, epoch: int, g: int, rank: int, ranks: int) -> Batch:
        """A rank's part of this grid's batch g. The draws of a source in it follow upon one another."""
        source, draw = self.order.batch(epoch, g, rank, ranks)
        parts, index, rows = list[Samples](), list[np.ndarray](), list[np.ndarray]()
        for k, grid in enumerate(self.sources.values()):
            rows.append(np.flatnonzero(source == k))
            draws = draw[rows[-1]].tolist() or [0, -1]
            for turn, numbers in grid.order.endless(draws[0], draws[-1] + 1):
                parts.append(grid.read(turn, numbers))
                index.append(numbers + grid.offset)
        back = np.argsort(np.concatenate(rows))
        return to_batch(Samples.joined(parts, back), np.concatenate(index)[back], text_encoder=grid.text_encoder)

    @property
    def identity(self) -> str:
        """Its shape, what it holds and in which proportions."""
        return " ".join([*(f"{k} {grid.identity}" for k, grid in self.sources.items()), self.weights])

    def drawn(self, batches: int) -> np.ndarray:
        """Samples of each source in the first batches of this grid: (K,)."""
        counts = np.zeros(self.mixed, dtype=np.int64)
        counts[list(self.sources)] = self.order.drawn(np.array([batches * self.order.batch_size]))[0]
        return counts


@dataclass
class TrainingBatches(Dataset):
    """(epoch, g) -> this rank's part of global training batch g. `Batch.valid` is None: every row counts."""

    grids: Sequence[TrainingGrid | MixedGrid]
    order: GridOrder
    rank: int
    ranks: int
    reshuffle: bool
    """False: every epoch is epoch 0."""

    def __len__(self) -> int:
        return len(self.order)

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        if len(self.grids) == 1 and isinstance(self.grids[0], Grid):
            return self.order.settings | {"shards": self.grids[0].reader.manifest.fingerprint("train")}
        listed = "".join(f"{grid.identity}\n" for grid in self.grids)
        return self.order.settings | {"shards": hashlib.sha256(listed.encode()).hexdigest()[:16]}

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch = item[0] if self.reshuffle else 0
        k, g = self.order.place(epoch, item[1])
        return self.grids[k].training_batch(epoch, g, self.rank, self.ranks)

    def drawn(self, epoch: int, g: int) -> np.ndarray:
        """Of a mixture: samples of each source before global batch g of an epoch, since the start of training: (K,)."""
        grids = [grid for grid in self.grids if isinstance(grid, MixedGrid)]
        done = self.order.done(epoch, g).tolist()
        return np.sum([grid.drawn(batches) for grid, batches in zip(grids, done, strict=True)], axis=0)


@dataclass
class EvaluationBatches(Dataset):
    """g -> this rank's part of global evaluation batch g, evaluation crops; `Batch.valid` is always set.

    One grid comes after the other, each with a padded last batch.
    """

    grids: list[Grid[EvaluationOrder]]
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(grid.order) for grid in self.grids])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, g: int) -> Batch:
        k = int(np.searchsorted(self._ends, g, side="right"))
        grid = self.grids[k]
        index, valid = grid.order.batch(g - int(self._ends[k]) + len(grid.order), self.rank, self.ranks)
        return grid.batch(index, valid=valid)


def training_batches(
    manifests: list[Manifest], batch_size: int, seed: int, window: int, cut: Cut = Cut(), reshuffle: bool = True
) -> TrainingBatches:
    """Training batches of one or several grids. Grids with fewer samples than one batch are left out, with a warning.

    Raises:
        ValueError: no grid has a whole batch, or there is no training split.
    """
    grids: list[TrainingGrid] = []
    offset = 0
    for manifest in manifests:
        samples = manifest.samples("train")
        if samples >= batch_size or not grids:  # the first has most samples; where they are too few, the order says so
            own_seed = seed if len(manifests) == 1 else stream(seed, *manifest.grid)
            order = TrainingOrder(manifest.block_sizes("train"), batch_size, own_seed, window)
            grids.append(TrainingGrid(cut.reader(manifest, "train"), order, cut.encoder(manifest), offset))
        elif samples and cut.rank == 0:
            warnings.warn(
                f"{manifest.root} has {samples} training samples, fewer than one batch of {batch_size}: they are left "
                "out.",
                stacklevel=2,
            )
        offset += samples
    return TrainingBatches(grids, GridOrder([grid.order for grid in grids], seed), cut.rank, cut.ranks, reshuffle)


def evaluation_batches(
    manifests: list[Manifest], split: str, batch_size: int, limit: int | None, cut: Cut = Cut()
) -> EvaluationBatches:
    """Evaluation batches of one or several grids, each sample once; `limit` as in `EvaluationOrder`, over all grids.

    Raises:
        ValueError: the split does not exist in any of them, or a limit below 1.
    """
    there = [manifest for manifest in manifests if manifest.samples(split)] or manifests[:1]
    readers = [cut.reader(manifest, split) for manifest in there]
    ends = np.cumsum([len(reader) for reader in readers])
    chosen = EvaluationOrder(int(ends[-1]), batch_size, limit).index  # (n,)
    counts = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(readers)).tolist()
    grids = [
        Grid(reader, EvaluationOrder(len(reader), batch_size, count), cut.encoder(reader.manifest), end - len(reader))
        for reader, count, end in zip(readers, counts, ends.tolist(), strict=True)
        if count
    ]
    return EvaluationBatches(grids, cut.rank, cut.ranks)
