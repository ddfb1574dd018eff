"""Small shard sets for the data tests."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.batches import TrainingBatches
from flashar_pl.data.loader import TrainingLoader
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter

GRID = (3, 4)
VOCABULARY = 300


def sample_codes(ids: np.ndarray, crops: int = 1, split: str = "train") -> np.ndarray:
    """Codes that tell sample, crop and split: (n, K, 3, 4)."""
    base = np.asarray(ids)[:, None, None, None] * 7 + np.arange(crops)[None, :, None, None] * 101
    base = base + {"train": 0, "validation": 3, "test": 5}[split]
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
            writer.write(split, sample_codes(ids, crops, split), ids=ids, labels=ids % 5)
    return writer.manifest


def in_pieces(
    make: Callable[[int, int], TrainingBatches], rows: Callable[[Batch], list], pieces: Iterable[tuple[int, int, int]]
) -> list[list]:
    """The rows of every global batch of a run that stops and resumes: pieces of (batches, ranks, workers)."""
    seen: list[list] = []
    state: dict[str, Any] | None = None
    for count, ranks, workers in pieces:
        taken, states = [], []
        for loader in (TrainingLoader(make(rank, ranks), workers) for rank in range(ranks)):
            if state is not None:
                loader.load_state_dict(state)
            part: list[list] = []
            while len(part) < count:
                for batch in loader:
                    part.append(rows(batch))
                    if len(part) == count:
                        break
            taken.append(part)
            states.append(loader.state_dict())
        assert all(s == states[0] for s in states), "the state is the same on every rank"
        state = json.loads(json.dumps(states[0]))
        seen += [[row for part in parts for row in part] for parts in zip(*taken, strict=True)]
    return seen
