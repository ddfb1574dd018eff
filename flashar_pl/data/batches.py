"""Batches of codes as pure functions: (epoch, global batch) -> this rank's part of it.

Because a batch is a function of two integers, worker processes hold no state, and the place in the data is two
integers too. Several data sets of one tokenizer, one for each grid (`flashar tokenize text-image` writes OUT/32x32,
OUT/27x36, ...), are one here: a global batch is of one grid on every rank.

Shapes: b samples of a rank's slice of a global batch, H x W grid, T text length, C feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashar_pl.backbones.condition import Batch, ClassIds, Condition, Prompts, TextFeatures
from flashar_pl.data.manifest import Manifest
from flashar_pl.data.order import EvaluationOrder, GridOrder, TrainingOrder, stream
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

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        return self.order.settings | {"shards": self.reader.manifest.fingerprint(self.reader.split)}

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch = item[0] if self.reshuffle else 0
        index = self.order.batch(epoch, item[1], self.rank, self.ranks)
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


@dataclass
class GridTraining(Dataset):
    """As `TrainingBatches`, over several grids. `Batch.index` counts through all of them."""

    parts: list[TrainingBatches]
    offsets: list[int]
    """Samples of the grids before each part."""
    order: GridOrder

    def __post_init__(self) -> None:
        self.ranks, self.reshuffle = self.parts[0].ranks, self.parts[0].reshuffle

    def __len__(self) -> int:
        return len(self.order)

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        digest = hashlib.sha256()
        for manifest in (part.reader.manifest for part in self.parts):
            digest.update(f"{manifest.grid[0]}x{manifest.grid[1]} {manifest.fingerprint('train')}\n".encode())
        return self.order.settings | {"shards": digest.hexdigest()[:16]}

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, g = item
        k, inner = self.order.place(epoch if self.reshuffle else 0, g)
        return _shifted(self.parts[k][epoch, inner], self.offsets[k])


@dataclass
class GridEvaluation(Dataset):
    """As `EvaluationBatches`: one grid after the other, each with a padded last batch."""

    parts: list[EvaluationBatches]
    offsets: list[int]

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.batch_size, self.ranks = self.parts[0].batch_size, self.parts[0].ranks

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, g: int) -> Batch:
        k = int(np.searchsorted(self._ends, g, side="right"))
        inner = g - (int(self._ends[k - 1]) if k else 0)
        return _shifted(self.parts[k][inner], self.offsets[k])


@dataclass(frozen=True)
class Cut:
    """What the batches of all splits have in common."""

    rank: int = 0
    ranks: int = 1
    encoder: EncoderOf = lambda manifest: None
    cache: str | None = None
    """Of remote shards; None = the user's cache directory."""


def training_batches(
    manifests: list[Manifest], batch_size: int, seed: int, window: int, cut: Cut, reshuffle: bool = True
) -> TrainingBatches | GridTraining:
    """Training batches of one or several grids. Grids with fewer samples than one batch are left out.

    Raises:
        ValueError: no grid has a whole batch, or there is no training split.
    """

    def part(manifest: Manifest, own_seed: int) -> TrainingBatches:
        order = TrainingOrder(manifest.block_sizes("train"), batch_size, own_seed, window)
        reader = ShardReader(manifest, "train", cut.cache)
        return TrainingBatches(reader, order, cut.rank, cut.ranks, cut.encoder(manifest), reshuffle)

    used = [k for k, manifest in enumerate(manifests) if manifest.samples("train") >= batch_size]
    if len(manifests) == 1 or not used:  # the first has most samples; an error says what is missing
        return part(manifests[0], seed)
    offsets = _offsets(manifests, "train")
    parts = [part(manifests[k], stream(seed, *manifests[k].grid)) for k in used]
    return GridTraining(parts, [offsets[k] for k in used], GridOrder([part.order for part in parts], seed))


def evaluation_batches(
    manifests: list[Manifest], split: str, batch_size: int, limit: int | None, cut: Cut
) -> EvaluationBatches | GridEvaluation:
    """Evaluation batches of one or several grids, each sample once; `limit` as in `EvaluationOrder`, over all grids.

    Raises:
        ValueError: the split does not exist in any of them, or a limit below 1.
    """
    there = [manifest for manifest in manifests if manifest.samples(split)] or manifests[:1]
    readers = [ShardReader(manifest, split, cut.cache) for manifest in there]
    offsets = np.array(_offsets(there, split))
    chosen = EvaluationOrder(sum(map(len, readers)), batch_size, limit).index  # (n,)
    counts = np.bincount(np.searchsorted(offsets, chosen, side="right") - 1, minlength=len(there))
    used = [k for k in range(len(there)) if counts[k]]
    parts = [
        EvaluationBatches(
            readers[k],
            EvaluationOrder(len(readers[k]), batch_size, int(counts[k])),
            cut.rank,
            cut.ranks,
            cut.encoder(there[k]),
        )
        for k in used
    ]
    return parts[0] if len(manifests) == 1 else GridEvaluation(parts, [int(offsets[k]) for k in used])


def _offsets(manifests: list[Manifest], split: str) -> list[int]:
    """Samples of the split before each data set."""
    sizes = [manifest.samples(split) for manifest in manifests]
    return [sum(sizes[:k]) for k in range(len(sizes))]


def _shifted(batch: Batch, offset: int) -> Batch:
    assert batch.index is not None
    return replace(batch, index=batch.index + offset)
