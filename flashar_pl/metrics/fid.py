"""FID during training: torchmetrics' metric over feature rows that were extracted already, summed over ranks.

Shapes: B rows of a batch, D feature columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from flashar_pl.metrics.reference import ReferenceStatistics


class _Rows(nn.Module):
    """Stands where torchmetrics expects the network: the rows are its features."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.num_features = columns

    def forward(self, rows: Tensor) -> Tensor:
        return rows


class RowFID(FrechetInceptionDistance):
    """FID of generated from real feature rows. `reset()` forgets the generated ones only.

    Use: update(rows (B, D), real=...) on every rank, then compute() -> scalar float64 tensor, equal on all ranks.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(feature=_Rows(columns), reset_real_features=False, compute_with_cache=False)
        self.has_real = False
        """Whether the real side is known: rows, or a reference."""

    def update(self, rows: Tensor, real: bool) -> None:
        """Add rows (B, D). Raises ValueError for values that are not finite."""
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("features hold NaN or infinity; expected finite values.")
        self.has_real |= real
        super().update(rows.double(), real)

    def set_reference(self, reference: ReferenceStatistics, rank: int) -> None:
        """Use stored moments as the real side; every rank calls this, and the first one's count in the sum."""
        mean, covariance = (torch.as_tensor(moments).double() for moments in (reference.mu, reference.sigma))
        if mean.shape != self.real_features_sum.shape:
            expected = len(self.real_features_sum)
            raise ValueError(f"the reference has moments of {len(mean)} features; expected {expected}.")
        n = reference.n or 2  # any number gives the same moments back
        self.has_real = True
        if rank == 0:
            self.real_features_sum = n * mean
            self.real_features_cov_sum = (n - 1) * covariance + n * torch.outer(mean, mean)
            self.real_features_num_samples = torch.tensor(n)
