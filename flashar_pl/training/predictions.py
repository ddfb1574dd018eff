"""What `flashar predict` found on all ranks, each image once.

Shapes: N images of a split, B of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def join_predictions(trainer: Trainer, batches: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """ "index" (N,) int64, ascending, and "nll" (N,) float of the images that all ranks have seen; equal on every rank.

    batches: this rank's results of `predict_step`. Padding is left out, and so is what a rank has seen that shares its
    data with another one.
    """
    own = [tuple(batch[name][batch["valid"]].cpu().numpy() for name in ("index", "nll")) for batch in batches]
    shares: list[list[tuple[np.ndarray, ...]]] = [own]
    if trainer.world_size > 1:
        shares = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(shares, own)
    index, nll = (np.concatenate(parts) for parts in zip(*(pair for share in shares for pair in share), strict=True))
    index, first = np.unique(index, return_index=True)
    return {"index": index, "nll": nll[first]}
