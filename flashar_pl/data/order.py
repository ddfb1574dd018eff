"""The order of samples: a pure function of (seed, epoch, block sizes), the same for any number of ranks and workers.

Training: the blocks are permuted, then the samples inside windows of consecutive permuted blocks. The permuted
samples are cut into global batches; each rank takes its slice of global batch g, and its batches are dealt to its
workers in turn. So (epoch, g) is the whole state of the data, whatever the number of ranks and workers.

Permutations sort by SplitMix64 outputs, a bijection of the index for every key: no ties, and the order does not
depend on the version of a random number library (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014).

Shapes: M blocks, N samples, B global batch, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_BLOCKS, _SAMPLES, _CROPS, _GRIDS = 1, 2, 3, 9


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 arrays of any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(*parts: int) -> int:
    """A 64-bit key from integers, such as (seed, epoch, purpose)."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([(key + (part & _MASK) * _GAMMA + _GAMMA) & _MASK], dtype=np.uint64))[0])
    return key


MOST_TOGETHER = 2**20
"""Samples of a batch: a number in a checkpoint may be any."""


def hashes(key: int, index: np.ndarray) -> np.ndarray:
    """One uint64 for each index (any shape) of the stream `key`; different indices give different values."""
    return mix64(np.array([key], dtype=np.uint64) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of 0 .. n - 1: (n,) int64."""
    return np.argsort(hashes(key, np.arange(n)))


def check_cut(batch_size: int, ranks: int, name: str = "batch_size") -> int:
    """Samples of a global batch for each rank. Raises ValueError if it cannot be cut evenly."""
    if batch_size > MOST_TOGETHER:
        raise ValueError(
            f"{name}={batch_size:,}; expected at most {MOST_TOGETHER:,} samples, which are held in memory."
        )
    if batch_size < 1:
        raise ValueError(f"{name} is {batch_size}; expected 1 or more.")
    if batch_size % ranks:
        up = -(-batch_size // ranks) * ranks
        raise ValueError(
            f"{name}={batch_size} is the global batch and cannot be cut evenly over {ranks} devices; "
            f"use a multiple of {ranks}, such as {up}."
        )
    return batch_size // ranks


class TrainingOrder:
    """The shuffled order of a training split.

    Args:
        block_sizes: (M,) samples of each block, in the order of the manifest.
        batch_size: global batch B, over all ranks.
        seed: any integer.
        window: blocks whose samples are shuffled together.

    Raises ValueError for fewer samples than one batch, or a size below 1.
    """

    def __init__(self, block_sizes: np.ndarray, batch_size: int, seed: int, window: int) -> None:
        if window < 1:
            raise ValueError(f"window={window}; expected an integer >= 1.")
        check_cut(batch_size, 1)
        self._sizes = np.asarray(block_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes  # (M,)
        self.samples = int(self._sizes.sum())
        if self.samples < batch_size:
            raise ValueError(
                f"The training split has {self.samples} samples, fewer than one batch of {batch_size}; "
                f"set batch_size to at most {self.samples} (--data.batch_size {self.samples})."
            )
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self._epoch = -1
        self._windows: dict[int, np.ndarray] = {}

    @property
    def settings(self) -> dict[str, int]:
        """What the order depends on, besides the blocks."""
        return {"batch_size": self.batch_size, "seed": self.seed, "window": self.window}

    def __len__(self) -> int:
        """Global batches of an epoch; the rest of the samples, fewer than a batch, is left out of that epoch."""
        return self.samples // self.batch_size

    def batch(self, epoch: int, g: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Sample numbers of a rank's slice of global batch g: (B / R,) int64. Raises ValueError unless R divides B."""
        local = check_cut(self.batch_size, ranks)
        start = g * self.batch_size + rank * local
        return self._slice(epoch, start, start + local)

    def endless(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Draws [start, stop) of epoch after epoch of all samples: (epoch, sample numbers (n,) int64) of each piece."""
        while start < stop:
            epoch, begin = divmod(start, self.samples)
            end = min(begin + stop - start, self.samples)
            yield epoch, self._slice(epoch, begin, end)
            start += end - begin

    def crops(self, epoch: int, index: np.ndarray, crops: int) -> np.ndarray:
        """Which crop of each sample (n,) this epoch shows: (n,) int64 below `crops`."""
        key = stream(self.seed, epoch, _CROPS)
        return (hashes(key, index) % np.uint64(crops)).astype(np.int64)

    def _slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of the order of an epoch."""
        if epoch != self._epoch:
            self._blocks = permutation(stream(self.seed, epoch, _BLOCKS), len(self._sizes))  # (M,)
            sizes = self._sizes[self._blocks]
            # ends[w] = samples before the end of window w
            self._ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.window)))
            self._epoch, self._windows = epoch, {}
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for w in range(first, last + 1):
            begin = int(self._ends[w - 1]) if w else 0
            parts.append(self._window(w)[max(0, start - begin) : stop - begin])
        return np.concatenate(parts)

    def _window(self, w: int) -> np.ndarray:
        """The shuffled samples of window w of the current epoch. The last two windows are kept."""
        if w not in self._windows:
            blocks = self._blocks[w * self.window : (w + 1) * self.window]
            sizes = self._sizes[blocks]
            before = np.cumsum(sizes) - sizes
            index = np.repeat(self._starts[blocks] - before, sizes) + np.arange(sizes.sum())  # ids, block by block
            shuffled = index[np.argsort(hashes(stream(self.seed, self._epoch, _SAMPLES), index))]
            self._windows = dict(list(self._windows.items())[-1:]) | {w: shuffled}
        return self._windows[w]


class GridOrder:
    """The order of global batches of one or several grids, which have one batch size.

    Batch g of an epoch is the next batch of a grid drawn at random by seed and epoch, so that every grid's batches are
    spread over the epoch and each grid is read in its own order.
    """

    def __init__(self, orders: Sequence[TrainingOrder | MixtureOrder], seed: int) -> None:
        self.settings = orders[0].settings | {"seed": seed}
        self.seed = seed
        self._counts = np.array([len(order) for order in orders])
        self._epoch = -1

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return int(self._counts.sum())

    def place(self, epoch: int, g: int) -> tuple[int, int]:
        """(number of the grid, number of the batch within the grid's epoch) of global batch g."""
        if epoch != self._epoch:
            slots = permutation(stream(self.seed, epoch, _GRIDS), len(self))
            self._grid = np.searchsorted(np.cumsum(self._counts), slots, side="right")  # (len,)
            by_grid = np.argsort(self._grid, kind="stable")
            self._inner = np.empty(len(self), dtype=np.int64)  # (len,)
            self._inner[by_grid] = np.concatenate([np.arange(count) for count in self._counts])
            self._epoch = epoch
        return int(self._grid[g]), int(self._inner[g])

    def done(self, epoch: int, g: int) -> np.ndarray:
        """Batches of each grid since the start of training, before global batch g of an epoch: (grids,) int64."""
        self.place(epoch, 0)
        return epoch * self._counts + np.bincount(self._grid[:g], minlength=len(self._counts))


class MixtureOrder:
    """The order of batches of one grid from K sources, which are drawn from in fixed proportions.

    Slot s of all slots since the start of training belongs to the source whose share is behind: after any number s of
    slots, source k has had s w_k / sum(w) of them but for K. Each source is gone through in its own order, all of its
    samples before one of them comes again, whatever its weight and the length of an epoch.

    Args:
        orders: of the sources, with a batch size of 1.
        weights: (K,) above 0; proportions, to a millionth.
        batch_size: global batch B, over all ranks.
        batches: of an epoch.
    """

    def __init__(self, orders: list[TrainingOrder], weights: list[float], batch_size: int, batches: int) -> None:
        check_cut(batch_size, 1)
        self.orders, self.batch_size, self._batches = orders, batch_size, batches
        self._weights = [max(1, round(weight / sum(weights) * 2**20)) for weight in weights]

    @property
    def settings(self) -> dict[str, int]:
        """What the order depends on, besides blocks and weights."""
        return self.orders[0].settings | {"batch_size": self.batch_size}

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return self._batches

    def drawn(self, slots: np.ndarray) -> np.ndarray:
        """Samples of each source among the first `slots` (n,) slots: (n, K) int64."""
        counts, rest, left = [], slots, sum(self._weights)
        for weight in self._weights:
            counts.append(rest * weight // left)
            rest, left = rest - counts[-1], left - weight
        return np.stack(counts, axis=-1)

    def batch(self, epoch: int, g: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """A rank's slice of global batch g: the source of each row, and which draw from it this is, (B / R,) int64."""
        local = check_cut(self.batch_size, ranks)
        start = (epoch * len(self) + g) * self.batch_size + rank * local
        counts = self.drawn(np.arange(start, start + local + 1))  # (b + 1, K)
        source = np.diff(counts, axis=0).argmax(axis=1)
        return source, counts[np.arange(local), source]


class EvaluationOrder:
    """Every sample once, in the order of the manifest; the last global batch is filled up with samples marked invalid.

    limit: use only this many samples, spread evenly over the split; None = all. Raises ValueError for a size below 1.
    """

    def __init__(self, samples: int, batch_size: int, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"The limit of samples is {limit}; expected an integer >= 1, or none.")
        check_cut(batch_size, 1)
        count = samples if limit is None else min(limit, samples)
        self.index = np.arange(count) * samples // count  # (count,)
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Global batches, the filled-up one included."""
        return -(-len(self.index) // self.batch_size)

    def batch(self, g: int, rank: int = 0, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """A rank's slice of global batch g: sample numbers (B / R,) int64 and valid (B / R,) bool."""
        local = check_cut(self.batch_size, ranks)
        at = g * self.batch_size + rank * local + np.arange(local)
        return self.index[np.minimum(at, len(self.index) - 1)], at < len(self.index)


Order = TypeVar("Order", TrainingOrder, EvaluationOrder)
