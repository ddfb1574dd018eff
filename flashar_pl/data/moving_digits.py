"""Videos embedded in the package: the digits behind a window that moves, one pixel a frame, in one of four directions.

Shapes: n videos, T = 4 frames of 6 x 6 codes, one below the other: (24, 6).
"""

from __future__ import annotations

import os

import numpy as np

from flashar_pl.data.digits import BLOCK, CLASSES, LEVELS, load_digits, split_digits
from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.order import stream
from flashar_pl.data.writer import ShardWriter

FRAMES, SIDE = 4, 6
DIRECTIONS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
"""Where the digit moves: (rows, columns) of a frame."""
MARGIN = 1
"""Empty pixels around the 8 x 8 digit."""
SHARD_BLOCKS = 40


def move(digits: np.ndarray, direction: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Videos (n, 24, 6) of digits (n, 8, 8). Along the direction the window begins at one of two places, across it
    lies at one of three."""
    wide = np.pad(digits, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))  # (n, 10, 10)
    rest = wide.shape[1] - SIDE - (FRAMES - 1)  # 1
    start = random.integers(0, rest + 1, len(digits))
    across = random.integers(MARGIN, wide.shape[1] - SIDE - MARGIN + 1, len(digits))
    axis = int(direction[1] != 0)
    frames = []
    for t in range(FRAMES):
        along = start + (FRAMES - 1 - t if sum(direction) > 0 else t)  # a window that moves up shows what moves down
        corner = (along, across) if axis == 0 else (across, along)
        rows, columns = (c[:, None] + np.arange(SIDE) for c in corner)  # (n, 6)
        frames.append(wide[np.arange(len(digits))[:, None, None], rows[:, :, None], columns[:, None]])
    return np.concatenate(frames, axis=1)


def tokenize_moving_digits(out: str | os.PathLike[str], seed: int = 0) -> Manifest:
    """Write the moving digits as code shards to a new directory: each digit of `tokenize_digits` in every direction.

    Class c is digit c % 10 in direction c // 10. The four videos of a digit are in the same split.

    Raises:
        ValueError: `out` exists, or scikit-learn is not installed.
    """
    digits, labels = load_digits()
    with ShardWriter(
        out,
        name="moving_digits",
        tokenizer={"kind": "pixels", "levels": LEVELS},
        grid=(FRAMES * SIDE, SIDE),
        frames=FRAMES,
        vocabulary=LEVELS,
        condition=ConditionSpec("class", num_classes=CLASSES * len(DIRECTIONS)),
        class_names=tuple(f"{digit} {name}" for name in DIRECTIONS for digit in range(CLASSES)),
        block=BLOCK,
        shard_blocks=SHARD_BLOCKS,
    ) as writer:
        for number, (split, index) in enumerate(split_digits(labels, seed).items()):
            random = np.random.default_rng(stream(seed, 3 + number))
            moved = [move(digits[index], direction, random) for direction in DIRECTIONS.values()]
            codes = np.stack(moved, axis=1).reshape(-1, FRAMES * SIDE, SIDE)  # the directions of a digit in turn
            classes = (labels[index][:, None] + CLASSES * np.arange(len(DIRECTIONS))).ravel()
            ids = (index[:, None] * len(DIRECTIONS) + np.arange(len(DIRECTIONS))).ravel()
            writer.write(split, codes, ids=ids, labels=classes)
    return writer.manifest
