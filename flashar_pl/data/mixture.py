"""Several data sets as one, drawn from in given proportions: `shards: {data/a: 0.7, data/b: 0.3}`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePosixPath

import numpy as np

from flashar_pl.data.batches import Cut, MixedGrid, TrainingBatches, TrainingGrid
from flashar_pl.data.manifest import Manifest, check_alike, load_grids
from flashar_pl.data.order import GridOrder, MixtureOrder, TrainingOrder, stream


@dataclass(frozen=True)
class MixedSource:
    """One of the data sets."""

    name: str
    """The last part of its place; the whole place where several end alike."""
    weight: float
    """Above 0; only proportions count."""
    manifests: tuple[Manifest, ...]
    """One for each grid."""

    @property
    def samples(self) -> int:
        """Training samples of all its grids."""
        return sum(manifest.samples("train") for manifest in self.manifests)


def load_mixture(weights: dict[str, float]) -> list[MixedSource]:
    """The data sets at some places, each as `load_grids` takes it, with their weights.

    Raises:
        ValueError: as `load_grids`; no place or a weight that is not above 0; two data sets that are the same, differ
            in tokenizer, vocabulary, condition, crops or class names, or have no grid in common (both are named).
    """
    if not weights:
        raise ValueError("shards names no data set; expected places with their weights, {data/a: 0.7, data/b: 0.3}.")
    ends = [PurePosixPath(place).name for place in weights]
    names = ends if len(set(ends)) == len(ends) else list(weights)
    sources = []
    for name, (place, weight) in zip(names, weights.items(), strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"shards: the weight of {place} is {weight}; expected a number above 0.")
        sources.append(MixedSource(name, weight, tuple(load_grids(place))))
    for first, second in combinations(sources, 2):
        _check_pair(first.manifests, second.manifests)
    return sources


def _check_pair(first: tuple[Manifest, ...], second: tuple[Manifest, ...]) -> None:
    """Raises ValueError unless two sources can be mixed."""
    one, other = first[0], second[0]
    facts, others = (m.shared | {"classes": m.class_names} for m in (one, other))
    advice = "the sources of a mixture must agree. Tokenize them alike, or leave one out."
    check_alike(one.root, facts, f"{other.root} has", others, advice)
    grids = [sorted(f"{m.grid[0]}x{m.grid[1]}" for m in each) for each in (first, second)]
    if not set(grids[0]) & set(grids[1]):
        raise ValueError(
            f"{one.root} has codes of {', '.join(grids[0])}, {other.root} of {', '.join(grids[1])}; the sources of a "
            "mixture need a grid in common. Tokenize them with the same --image-size, --buckets or --crop."
        )
    same = {m.fingerprint("train") for m in first if m.samples("train")}
    if twin := [m for m in second if m.samples("train") and m.fingerprint("train") in same]:
        raise ValueError(f"{one.root} and {twin[0].root} hold the same samples; give one of them.")


def mixed_batches(
    sources: list[MixedSource], batch_size: int, seed: int, window: int, cut: Cut, reshuffle: bool
) -> TrainingBatches:
    """Training batches of a mixture. An epoch has as many samples as the sources together.

    The part of a source's draws that are of one of its grids is that grid's part of its samples. A grid that makes up
    less than a batch of an epoch is left out, with a warning.

    Raises:
        ValueError: a source without training samples, or fewer samples together than one batch.
    """
    total, share = sum(source.samples for source in sources), sum(source.weight for source in sources)
    if total < batch_size:
        raise ValueError(
            f"The sources have {total} training samples together, fewer than one batch of {batch_size}; set batch_size "
            f"to at most {total}."
        )
    held: dict[tuple[int, int], dict[int, tuple[TrainingGrid, float]]] = {}
    offset = 0
    for k, source in enumerate(sources):
        source.manifests[0].shards("train")  # says what is missing
        for manifest in source.manifests:
            if n := manifest.samples("train"):
                order = TrainingOrder(manifest.block_sizes("train"), 1, stream(seed, k, *manifest.grid), window)
                grid = TrainingGrid(cut.reader(manifest, "train"), order, cut.encoder(manifest), offset)
                held.setdefault(manifest.grid, {})[k] = grid, source.weight / share * n / source.samples
                offset += n
    grids, given = list[MixedGrid](), " ".join(str(source.weight) for source in sources)
    for shape, parts in sorted(held.items(), key=lambda item: -sum(weight for _, weight in item[1].values())):
        weights = [weight for _, weight in parts.values()]
        batches = math.floor(total * sum(weights) / batch_size + 1e-9)
        if batches or not grids:
            held_by = {k: grid for k, (grid, _) in parts.items()}
            own = MixtureOrder([grid.order for grid in held_by.values()], weights, batch_size, max(1, batches))
            grids.append(MixedGrid(held_by, own, len(sources), given))
        elif cut.rank == 0:
            warnings.warn(
                f"{shape[0]} x {shape[1]} codes make up less than one batch of {batch_size} in an epoch of the "
                "mixture: they are left out.",
                stacklevel=2,
            )
    orders = GridOrder([grid.order for grid in grids], seed)
    return TrainingBatches(grids, orders, cut.rank, cut.ranks, reshuffle)


def described(sources: list[MixedSource], batches: TrainingBatches) -> str:
    """What an epoch of a mixture draws from each source, for people."""
    drawn = np.diff([batches.drawn(epoch, 0) for epoch in (0, 1)], axis=0)[0].tolist()
    return "An epoch of the mixture: " + ", ".join(
        f"{source.name} {n:,} samples ({n / source.samples:.2f} of its {source.samples:,})"
        for source, n in zip(sources, drawn, strict=True)
    )
