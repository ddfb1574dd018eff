"""Several data sets of one tokenizer, one for each grid, as one: training on images of several aspect ratios.

`flashar tokenize text-image` writes them: OUT/32x32, OUT/27x36, ... with a manifest each. A global batch is of one
grid on every device; the samples of each grid are shuffled by themselves, and the order of grids is a function of
seed and epoch. So (epoch, batch) is the whole state of the data, as for one grid.

Shapes: b samples of a rank's slice of a global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.loader import EvaluationBatches, TextEncoder, TrainingBatches
from flashar_pl.data.locations import is_remote
from flashar_pl.data.manifest import FILE_NAME, Manifest, sub_manifests
from flashar_pl.data.order import EvaluationOrder, GridOrder, TrainingOrder, stream
from flashar_pl.data.reader import ShardReader

EncoderOf = Callable[[Manifest], TextEncoder | None]
"""What turns the captions of a data set into token ids; None where it has none."""


def load_grids(location: str) -> list[Manifest]:
    """The manifest at `location`, or those in its sub-folders: the grid with most training samples first.

    Raises:
        ValueError: as `Manifest.load`; a training split that is still being written; sub-folders that differ in
            tokenizer, vocabulary, condition or crops, or have one grid twice.
    """
    folder = Path(location)
    if is_remote(location) or folder.name == FILE_NAME or (folder / FILE_NAME).is_file():
        return [Manifest.load(location)]
    found = [Manifest.load(path) for path in sub_manifests(folder)]
    if not found:
        return [Manifest.load(location)]  # says what is missing
    if (folder / ".train").is_dir():
        raise ValueError(f"The training split in {location} is not finished; run the same flashar tokenize again.")
    for other in found[1:]:
        for name, value in _shared(found[0]).items():
            if _shared(other)[name] != value:
                raise ValueError(
                    f"{other.root} has {name} {_shared(other)[name]}, {found[0].root} has {value}; the data sets in "
                    f"{location} must agree. Give one of them, or tokenize them alike."
                )
    grids = [manifest.grid for manifest in found]
    if len(set(grids)) < len(grids):
        raise ValueError(
            f"Several data sets in {location} have the same grid; expected one for each. Give one of them."
        )
    return sorted(found, key=lambda manifest: (-manifest.samples("train"), manifest.grid))


def _shared(manifest: Manifest) -> dict[str, Any]:
    """What all grids must have in common."""
    tokenizer = {name: value for name, value in manifest.tokenizer.items() if name != "weights"}
    return {
        "tokenizer": tokenizer,
        "vocabulary": manifest.vocabulary,
        "condition": manifest.condition,
        "crops": manifest.crops,
    }


@dataclass
class GridTraining(Dataset):
    """(epoch, g) -> this rank's part of global training batch g. `Batch.index` counts through all grids."""

    parts: list[TrainingBatches]
    offsets: list[int]
    """Samples of the grids before each part."""
    order: GridOrder

    def __len__(self) -> int:
        return len(self.order)

    @property
    def batch_size(self) -> int:
        """Global batch, over all ranks."""
        return self.order.batch_size

    @property
    def ranks(self) -> int:
        """Ranks a batch is cut over."""
        return self.parts[0].ranks

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        digest = hashlib.sha256()
        for part in self.parts:
            height, width = part.reader.manifest.grid
            digest.update(f"{height}x{width} {part.reader.manifest.fingerprint('train')}\n".encode())
        return {
            "batch_size": self.order.batch_size,
            "seed": self.order.seed,
            "window": self.order.window,
            "shards": digest.hexdigest()[:16],
        }

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, g = item
        k, inner = self.order.place(epoch if self.parts[0].reshuffle else 0, g)
        return _shifted(self.parts[k][epoch, inner], self.offsets[k])


@dataclass
class GridEvaluation(Dataset):
    """g -> this rank's part of global evaluation batch g: one grid after the other, each with a padded last batch."""

    parts: list[EvaluationBatches]
    offsets: list[int]

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def batch_size(self) -> int:
        """Global batch, over all ranks."""
        return self.parts[0].batch_size

    @property
    def ranks(self) -> int:
        """Ranks a batch is cut over."""
        return self.parts[0].ranks

    def __getitem__(self, g: int) -> Batch:
        k = int(np.searchsorted(self._ends, g, side="right"))
        inner = g - (int(self._ends[k - 1]) if k else 0)
        return _shifted(self.parts[k][inner], self.offsets[k])


def training_batches(
    manifests: list[Manifest],
    batch_size: int,
    seed: int,
    window: int,
    rank: int,
    ranks: int,
    encoder: EncoderOf,
    cache: str | None = None,
    reshuffle: bool = True,
) -> TrainingBatches | GridTraining:
    """Training batches of one or several grids. Grids with fewer samples than one batch are left out.

    Raises:
        ValueError: no grid has a whole batch, or there is no training split.
    """

    def part(manifest: Manifest, own_seed: int) -> TrainingBatches:
        order = TrainingOrder(manifest.block_sizes("train"), batch_size, own_seed, window)
        reader = ShardReader(manifest, "train", cache)
        return TrainingBatches(reader, order, rank, ranks, encoder(manifest), reshuffle)

    if len(manifests) == 1:
        return part(manifests[0], seed)
    offsets = _offsets(manifests, "train")
    used = [k for k, manifest in enumerate(manifests) if manifest.samples("train") >= batch_size]
    if not used:
        part(manifests[0], seed)  # raises: this is the grid with most samples
    parts = [part(manifests[k], stream(seed, *manifests[k].grid)) for k in used]
    return GridTraining(parts, [offsets[k] for k in used], GridOrder([part.order for part in parts], seed))


def left_out(manifests: list[Manifest], batch_size: int) -> list[Manifest]:
    """The grids among several that have training samples, but fewer than one batch."""
    several = manifests if len(manifests) > 1 else []
    return [manifest for manifest in several if 0 < manifest.samples("train") < batch_size]


def evaluation_batches(
    manifests: list[Manifest],
    split: str,
    batch_size: int,
    limit: int | None,
    rank: int,
    ranks: int,
    encoder: EncoderOf,
    cache: str | None = None,
) -> EvaluationBatches | GridEvaluation:
    """Evaluation batches of one or several grids, each sample once; `limit` as in `EvaluationOrder`, over all grids.

    Raises:
        ValueError: the split does not exist in any of them, or a limit below 1.
    """
    there = [manifest for manifest in manifests if manifest.samples(split)] or manifests[:1]
    readers = [ShardReader(manifest, split, cache) for manifest in there]
    offsets = np.array(_offsets(there, split))
    chosen = EvaluationOrder(sum(map(len, readers)), batch_size, limit).index  # (n,)
    counts = np.bincount(np.searchsorted(offsets, chosen, side="right") - 1, minlength=len(there))
    used = [k for k in range(len(there)) if counts[k]]
    parts = [
        EvaluationBatches(
            readers[k], EvaluationOrder(len(readers[k]), batch_size, int(counts[k])), rank, ranks, encoder(there[k])
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
