"""The one Fréchet distance metric of training and evaluation: streaming float64 moments, summed over ranks.

Shape legend: B batch, D feature columns.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from flashar_pl.metrics.distribution import check_moments, frechet_distance_from_moments
from flashar_pl.metrics.extractor import extract_features


class _Columns(nn.Module):
    """Tells torchmetrics the number of columns; the extractor itself stays outside the module tree."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID that also takes feature rows and stored reference moments.

    Sums are float64 whatever the features are, and stay so under .half() or set_dtype. The extractor is kept outside
    the module tree (a LightningModule that owns this metric neither trains, wraps nor saves it) and follows its device.

    Args:
        feature: an extractor (uint8 images (B, 3, h, w) -> (B, D), integer attribute `num_features`), or the number D
            where only feature rows are given.
        reset_real_features: whether reset() forgets real rows. Moments from `set_reference` are never forgotten.
        min_samples: compute() refuses fewer rows than this on either side, counted over all ranks.

    Use: update(images or features, real=...), then compute() -> scalar float64 tensor, equal on all ranks.
    """

    def __init__(
        self, feature: nn.Module | int, *, reset_real_features: bool = False, min_samples: int = 2, **kwargs: Any
    ) -> None:
        columns = feature if isinstance(feature, int) else getattr(feature, "num_features", None)
        if not isinstance(columns, int) or columns < 1:
            raise ValueError(f"feature must be a number of columns or a module with an integer num_features: {feature}")
        if min_samples < 2:
            raise ValueError(f"min_samples must be at least 2 (a covariance needs two rows), got {min_samples}")
        super().__init__(feature=_Columns(columns), reset_real_features=reset_real_features, **kwargs)
        self.num_features = columns
        self.min_samples = min_samples
        self._extractor = () if isinstance(feature, int) else (feature,)
        self._reference: tuple[Tensor, Tensor, int | None] | None = None

    def update(self, imgs: Tensor, real: bool, valid: Tensor | None = None) -> None:
        """Add uint8 images (B, 3, h, w) or feature rows (B, D).

        Args:
            imgs: images where the metric has an extractor, or float features.
            real: True for the reference side.
            valid: (B,) bool, False for rows that only pad a last batch; None counts all.

        Raises:
            ValueError: wrong shape or dtype, values that are not finite, images without an extractor, or real rows
                although reference moments are set.
        """
        if real and self._reference is not None:
            raise ValueError("reference moments are set, real rows would mix with them: call clear_reference() first")
        rows = self._rows(imgs)
        if valid is not None:
            rows = rows[valid.to(rows.device)]
        rows = rows.to(self.device, torch.float64)  # (B, D)
        side = "real" if real else "fake"
        getattr(self, f"{side}_features_sum").add_(rows.sum(dim=0))
        getattr(self, f"{side}_features_cov_sum").add_(rows.T @ rows)
        getattr(self, f"{side}_features_num_samples").add_(len(rows))

    def update_features(self, features: Tensor, real: bool, valid: Tensor | None = None) -> None:
        """Add feature rows (B, D); see `update`."""
        if features.ndim != 2:
            raise ValueError(f"features must have shape (B, {self.num_features}), got {tuple(features.shape)}")
        self.update(features, real=real, valid=valid)

    def _rows(self, given: Tensor) -> Tensor:
        if given.ndim == 4:
            if not self._extractor:
                raise ValueError("this metric was built without an extractor: give feature rows, not images")
            extractor = self._extractor[0].to(self.device)
            return extract_features(extractor, given).pool
        if given.ndim != 2 or given.shape[1] != self.num_features or not given.is_floating_point():
            raise ValueError(
                f"expected float features (B, {self.num_features}) or uint8 images (B, 3, h, w), "
                f"got {given.dtype} {tuple(given.shape)}"
            )
        if not bool(torch.isfinite(given).all()):
            raise ValueError("features hold NaN or infinity")
        return given

    def set_reference(self, mu: Any, sigma: Any, n: int | None = None) -> None:
        """Use stored moments as the real side: mean (D,), unbiased covariance (D, D), n rows (None: not known).

        Every rank sets the same moments; they are not summed and survive reset().
        """
        mean, covariance = check_moments(mu, sigma, "reference")
        if len(mean) != self.num_features:
            raise ValueError(f"reference moments have {len(mean)} columns, the metric has {self.num_features}")
        if int(self.real_features_num_samples) > 0:
            raise ValueError("real rows were already added: reference moments would mix with them")
        self._reference = (mean.cpu(), covariance.cpu(), n)
        self._computed = None

    def clear_reference(self) -> None:
        """Forget the moments of `set_reference`."""
        self._reference = None
        self._computed = None

    @property
    def has_reference(self) -> bool:
        """Whether the real side is known: set moments or real rows."""
        return self._reference is not None or int(self.real_features_num_samples) > 0

    def moments(self, real: bool) -> tuple[Tensor, Tensor, int]:
        """Mean (D,), unbiased covariance (D, D) in float64 and number of rows of one side, as held by this rank."""
        side = "real" if real else "fake"
        count = int(getattr(self, f"{side}_features_num_samples"))
        self._refuse(count, side)
        mean = getattr(self, f"{side}_features_sum") / count
        centred = getattr(self, f"{side}_features_cov_sum") - count * torch.outer(mean, mean)
        return mean, centred / (count - 1), count

    def compute(self) -> Tensor:
        """The distance, a float64 scalar. ValueError where a side has fewer than `min_samples` rows."""
        mean, covariance, count = self.moments(real=False)
        if self._reference is not None:
            real_mean, real_covariance, real_count = self._reference
            if real_count is not None:
                self._refuse(real_count, "real")
        else:
            real_mean, real_covariance, real_count = self.moments(real=True)
        few = min(count, real_count if real_count is not None else count)
        if few <= self.num_features:
            warnings.warn(
                f"{few} rows for {self.num_features} features: the covariance is singular and the distance biased "
                "upwards; compare only results of equal sample counts",
                stacklevel=2,
            )
        value = frechet_distance_from_moments(
            mean, covariance, real_mean.to(mean.device), real_covariance.to(mean.device)
        )
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _refuse(self, count: int, side: str) -> None:
        if count < self.min_samples:
            kind = "real" if side == "real" else "generated"
            raise ValueError(
                f"{count} {kind} samples are too few for this Fréchet distance: at least {self.min_samples} are needed"
            )

    def set_dtype(self, dst_type: str | torch.dtype) -> "FrechetDistance":
        """Does nothing: the sums stay float64."""
        return self
