"""Checks of feature rows, which every metric makes."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Tensor | np.ndarray


def check_rows(values: Array, name: str, minimum: int = 1) -> Tensor:
    """One set of rows (n, d) in its own floating dtype (integers: float64); ValueError where it is none."""
    if isinstance(values, np.ndarray) and (not values.flags.writeable or min(values.strides, default=0) < 0):
        values = values.copy("K")  # torch takes neither read-only arrays, such as memory maps, nor negative strides
    rows = torch.as_tensor(values).detach()
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} is {tuple(rows.shape)}; expected (rows, columns).")
    if len(rows) < minimum:
        raise ValueError(f"{name} has {len(rows)} row(s); expected at least {minimum} for this metric.")
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise ValueError(f"{name} holds NaN or infinity in {bad} of {len(rows)} rows; expected finite values.")
    return rows if rows.is_floating_point() else rows.double()


def check_pair(samples: Array, reference: Array, minimum: int) -> tuple[Tensor, Tensor]:
    """Two sets of rows (n, d) and (m, d), on the samples' device; ValueError where they have other columns."""
    x, y = check_rows(samples, "samples", minimum), check_rows(reference, "reference", minimum)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples have {x.shape[1]} columns, reference has {y.shape[1]}; expected the same features.")
    return x, y.to(x.device)
