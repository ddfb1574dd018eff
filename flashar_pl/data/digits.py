"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels whose 17 grey levels are the codes."""

from __future__ import annotations

import os

import numpy as np

from flashar_pl.console import needing
from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.order import permutation, stream
from flashar_pl.data.writer import ShardWriter

LEVELS = 17
CLASSES = 10
SIZES = {"train": 1400, "validation": 100, "test": 297}
BLOCK, SHARD_BLOCKS = 50, 10


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits: codes (1797, 8, 8) int64 in 0 .. 16 and labels (1797,) int64 in 0 .. 9.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    with needing("the data set of digits", "demo"):
        from sklearn import datasets
    bunch = datasets.load_digits()
    return bunch.images.astype(np.int64), bunch.target.astype(np.int64)


def split_digits(labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Sample numbers of each split, shuffled by the seed; every class of labels (1797,) is shared out in proportion."""
    n = len(labels)
    shuffled = permutation(stream(seed, 1), n)
    # Rank of each sample among its class, as a fraction of the class: sorting by it spreads every class evenly.
    share = np.empty(n)
    for label in range(CLASSES):
        members = shuffled[labels[shuffled] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    spread = shuffled[np.argsort(share[shuffled], kind="stable")]
    test, validation, train = np.split(spread, np.cumsum([SIZES["test"], SIZES["validation"]]))
    parts = {"train": train, "validation": validation, "test": test}
    return {name: part[permutation(stream(seed, 2), len(part))] for name, part in parts.items()}


def tokenize_digits(out: str | os.PathLike[str], seed: int = 0) -> Manifest:
    """Write the digits as code shards to a new directory: 1,400 train, 100 validation, 297 test, in blocks of 50.

    Raises:
        ValueError: `out` exists, or scikit-learn is not installed.
    """
    codes, labels = load_digits()
    with ShardWriter(
        out,
        name="digits",
        tokenizer={"kind": "pixels", "levels": LEVELS},
        grid=codes.shape[1:],
        vocabulary=LEVELS,
        condition=ConditionSpec("class", num_classes=CLASSES),
        block=BLOCK,
        shard_blocks=SHARD_BLOCKS,
    ) as writer:
        for split, index in split_digits(labels, seed).items():
            writer.write(split, codes[index], ids=index, labels=labels[index])
    return writer.manifest
