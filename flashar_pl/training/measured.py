"""What `flashar validate`, `test` and `predict` found: a table of rounded numbers, and files with all digits.

Shapes: N images of a split, B of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashar_pl.console import table, versions
from flashar_pl.files import write_json
from flashar_pl.ranks import gather

DIGITS = 5
"""Shown of a number."""


def report(verb: str, metrics: Mapping[str, Any], target: Path, facts: Mapping[str, Any]) -> None:
    """Print the numbers and write them to `target`, a new file. facts: what they were measured on."""
    numbers = {name: float(value) for name, value in sorted(metrics.items())}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"command": verb, "metrics": numbers, **facts, "versions": versions()})
    print(table(("metric", "value"), [[name, rounded(value)] for name, value in numbers.items()]))
    print(f"wrote {target}")


def rounded(value: float) -> str:
    """A number as people read it; whole ones, such as counts, in full."""
    return f"{value:,.0f}" if value.is_integer() else f"{value:.{DIGITS}g}"


def join_predictions(batches: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """ "index" (N,) int64, ascending, and "nll" (N,) float of the images that all ranks have seen; equal on every rank.

    batches: this rank's results of `predict_step`. Padding is left out, and what several ranks have seen counts once.
    Raises ValueError for a likelihood that is none, on every rank.
    """
    own = [tuple(batch[name][batch["valid"]].cpu().numpy() for name in ("index", "nll")) for batch in batches]
    pairs = [pair for share in gather(own) for pair in share]
    index, nll = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    index, first = np.unique(index, return_index=True)
    nll = nll[first]
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        raise ValueError(
            f"the likelihood of test image {index[bad[0]]} is {nll[bad[0]]}; the model's weights are broken."
        )
    return {"index": index, "nll": nll}
