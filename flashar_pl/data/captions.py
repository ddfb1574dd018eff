"""What the captions of a split look like: empty ones, repeated ones, lengths."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np

from flashar_pl.data.reader import ShardReader

READ = 10_000
"""Captions read at once."""
EDGES = (0, 1, 50, 100, 200, 400, 800, 1600)
"""Lower edges of the length histogram, in characters."""


def caption_report(reader: ShardReader) -> dict[str, Any]:
    """Counts over every caption of a split, and the same as lines of text under "lines".

    "empty" captions train like no caption; many samples with one caption ("repeated": samples whose caption some
    earlier sample has) often mean that a column was mixed up.
    """
    seen: Counter[str] = Counter()
    lengths = np.zeros(len(reader), dtype=np.int64)
    for begin in range(0, len(reader), READ):
        index = np.arange(begin, min(begin + READ, len(reader)))
        texts = reader.read(index).texts
        assert texts is not None
        seen.update(text.strip() for text in texts)
        lengths[index] = [len(text.strip()) for text in texts]
    filled = Counter({text: count for text, count in seen.items() if text})
    repeated = sum(filled.values()) - len(filled)
    most, times = filled.most_common(1)[0] if filled else ("", 0)
    histogram = np.histogram(lengths, bins=[*EDGES, np.inf])[0].tolist()
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(EDGES)] + [f"{EDGES[-1]} or more"]
    names[0] = "0"
    quarters = [int(value) for value in np.quantile(lengths, [0.0, 0.5, 1.0])]
    lines = [
        f"captions: {seen['']:,} empty, {repeated:,} repeated; {quarters[0]} to {quarters[2]} characters, "
        f"median {quarters[1]}",
        "characters: " + ", ".join(f"{name}: {count:,}" for name, count in zip(names, histogram, strict=True)),
    ]
    if times > 1:
        lines.append(f"most frequent, {times:,} times: {most[:80]!r}")
    return {
        "empty": seen[""],
        "repeated": repeated,
        "most_frequent": [most, times],
        "histogram": dict(zip(names, histogram, strict=True)),
        "lines": lines,
    }
