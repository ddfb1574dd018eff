"""Small shard sets for the data tests."""

from pathlib import Path

import numpy as np

from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter

GRID = (3, 4)
VOCABULARY = 300


def sample_codes(ids: np.ndarray, crops: int = 1) -> np.ndarray:
    """Codes that tell sample and crop: (n, K, 3, 4)."""
    base = np.asarray(ids)[:, None, None, None] * 7 + np.arange(crops)[None, :, None, None] * 101
    return (base + np.arange(12).reshape(1, 1, *GRID)) % VOCABULARY


def write_classes(
    out: Path,
    sizes: dict[str, int] | None = None,
    crops: int = 1,
    block: int = 10,
    shard_blocks: int = 3,
    evaluation_crop: int = 0,
) -> Manifest:
    """Class-conditional shards; sample i of a split has the id i and the label i % 5."""
    with ShardWriter(
        out, name="toy", tokenizer={"kind": "none"}, grid=GRID, vocabulary=VOCABULARY,
        condition=ConditionSpec("class", num_classes=5), crops=crops, block=block, shard_blocks=shard_blocks,
        evaluation_crop=evaluation_crop,
    ) as writer:  # fmt: skip
        for split, n in (sizes or {"train": 107, "validation": 23, "test": 31}).items():
            ids = np.arange(n)
            writer.write(split, sample_codes(ids, crops), ids=ids, labels=ids % 5)
    return writer.manifest
