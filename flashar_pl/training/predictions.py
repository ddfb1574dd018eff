"""What `flashar predict` found on all ranks, each image once.

Shapes: N images of a split, B of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashar_pl.ranks import gather


def join_predictions(batches: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """ "index" (N,) int64, ascending, and "nll" (N,) float of the images that all ranks have seen; equal on every rank.

    batches: this rank's results of `predict_step`. Padding is left out, and what several ranks have seen counts once.
    """
    own = [tuple(batch[name][batch["valid"]].cpu().numpy() for name in ("index", "nll")) for batch in batches]
    pairs = [pair for share in gather(own) for pair in share]
    index, nll = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    index, first = np.unique(index, return_index=True)
    return {"index": index, "nll": nll[first]}
