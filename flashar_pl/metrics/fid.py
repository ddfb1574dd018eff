"""The one Fréchet distance of training and evaluation: streaming float64 moments, summed over ranks.

Shapes: B rows of a batch, D feature columns.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flashar_pl.metrics.distribution import Array, check_moments, frechet_distance_from_moments

SIDES = ("real", "fake")


class FrechetDistance(Metric):
    """Fréchet distance of generated feature rows from real ones, or from stored moments, as a torchmetrics Metric.

    Sums are float64 whatever the features are, and stay so under .half(). reset() forgets generated rows only.

    Args:
        columns: D.

    Use: update(rows, real=...), then compute() -> scalar float64 tensor, equal on all ranks.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, **kwargs)
        self.columns = columns
        for side in SIDES:
            self.add_state(f"{side}_sum", torch.zeros(columns, dtype=torch.float64), "sum")
            self.add_state(f"{side}_products", torch.zeros(columns, columns, dtype=torch.float64), "sum")
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), "sum")
        self._reference: tuple[Tensor, Tensor, int | None] | None = None

    def update(self, rows: Tensor, real: bool, valid: Tensor | None = None) -> None:
        """Add feature rows (B, D); valid (B,) bool is False for rows that only pad a last batch.

        Raises:
            ValueError: wrong shape or dtype, or values that are not finite.
        """
        assert not (real and self._reference is not None), "real rows would mix with the reference moments"
        if rows.ndim != 2 or rows.shape[1] != self.columns or not rows.is_floating_point():
            raise ValueError(f"features are {tuple(rows.shape)} {rows.dtype}; expected float rows (B, {self.columns}).")
        if valid is not None:
            rows = rows[valid.to(rows.device)]
        rows = rows.to(self.device, torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("features hold NaN or infinity; expected finite values.")
        side = "real" if real else "fake"
        getattr(self, f"{side}_sum").add_(rows.sum(dim=0))
        getattr(self, f"{side}_products").add_(rows.T @ rows)
        getattr(self, f"{side}_count").add_(len(rows))

    def reset(self) -> None:
        """Forget generated rows; real rows and reference moments stay."""
        names = [name for name in self.metric_state if name.startswith("real")]
        real = {name: getattr(self, name) for name in names}
        super().reset()
        for name, value in real.items():
            setattr(self, name, value)

    def set_reference(self, mu: Array, sigma: Array, n: int | None = None) -> None:
        """Use stored moments as the real side: mean (D,), unbiased covariance (D, D), n rows (None: not known).

        Every rank sets the same moments; they are not summed and survive reset().

        Raises:
            ValueError: moments of other features.
        """
        mean, covariance = check_moments(mu, sigma, "reference")
        if len(mean) != self.columns:
            raise ValueError(f"the reference has moments of {len(mean)} features; expected {self.columns}.")
        assert int(self.real_count) == 0, "reference moments would mix with real rows"  # type: ignore[arg-type]
        self._reference = (mean.cpu(), covariance.cpu(), n)

    @property
    def has_reference(self) -> bool:
        """Whether the real side is known: set moments or real rows."""
        return self._reference is not None or int(self.real_count) > 0  # type: ignore[arg-type]

    def moments(self, real: bool) -> tuple[Tensor, Tensor, int]:
        """Mean (D,), unbiased covariance (D, D) in float64 and number of rows of one side, as held by this rank.

        Raises:
            ValueError: fewer than 2 rows.
        """
        side = "real" if real else "fake"
        count = int(getattr(self, f"{side}_count"))
        if count < 2:
            kind = "real" if real else "generated"
            raise ValueError(f"{count} {kind} samples are too few for a Fréchet distance; expected 2 or more.")
        mean = getattr(self, f"{side}_sum") / count
        centred = getattr(self, f"{side}_products") - count * torch.outer(mean, mean)
        return mean, centred / (count - 1), count

    def compute(self) -> Tensor:
        """The distance, a float64 scalar. ValueError where a side has fewer than 2 rows."""
        mean, covariance, count = self.moments(real=False)
        real_mean, real_covariance, real_count = self._reference or self.moments(real=True)
        few = min(count, count if real_count is None else real_count)
        if few <= self.columns:
            warnings.warn(
                f"{few} rows for {self.columns} features: the covariance is singular and the distance biased upwards; "
                "compare only results of equal sample counts",
                stacklevel=2,
            )
        value = frechet_distance_from_moments(
            mean, covariance, real_mean.to(mean.device), real_covariance.to(mean.device)
        )
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def set_dtype(self, dst_type: str | torch.dtype) -> FrechetDistance:
        """Does nothing: the sums stay float64."""
        return self
