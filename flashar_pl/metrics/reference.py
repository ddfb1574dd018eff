"""Reference statistics: the moments and feature rows of real images that samples are compared with.

The file layout is the ADM evaluator's .npz (mu, sigma, mu_s, sigma_s, arr_0), so its reference batches load as they are
and files written here serve its FID and sFID.

Shapes: m reference images of h x w pixels, D pooled features, S spatial features, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.files import replacing
from flashar_pl.metrics.distribution import check_moments
from flashar_pl.metrics.extractor import FeatureExtractor, extract_features
from flashar_pl.tensor_files import read_arrays

KEEP_FEATURES = 10_000
"""Rows kept for precision, recall and KID, as many as the ADM reference batches hold."""
BATCH = 64
"""Images whose features are computed together."""
IMAGES = "arr_0"
"""The array of images (m, h, w, 3) uint8 of an ADM reference batch."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """Float64 moments of real images, optional spatial moments (sFID) and feature rows (precision, recall, KID)."""

    mu: np.ndarray
    """(D,)."""
    sigma: np.ndarray
    """(D, D), unbiased."""
    n: int | None = None
    """Images behind the moments; None = not known."""
    mu_s: np.ndarray | None = None
    """(S,)."""
    sigma_s: np.ndarray | None = None
    """(S, S)."""
    features: np.ndarray | None = None
    """(m, D) float32."""

    def save(self, path: str | Path) -> Path:
        """Write an .npz, complete or not at all."""
        arrays = {name: np.asarray(value) for name, value in vars(self).items() if value is not None}
        with replacing(path) as part, part.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        return Path(path)


class Moments:
    """Mean and covariance of feature rows in float64, however many batches the rows come from.

    Products are taken around each batch's own mean (Chan et al., 1979): what is nearly constant keeps its digits, and
    the covariance has no negative eigenvalues beyond rounding of itself.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean = torch.zeros(columns, dtype=torch.float64)
        """(D,)."""
        self.products = torch.zeros(columns, columns, dtype=torch.float64)
        """(D, D): sum of the outer products of (row - mean)."""

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of rows (n, D)."""
        moments = cls(rows.shape[1])
        for part in rows.split(4096):
            moments.add(part)
        return moments

    def add(self, rows: Tensor) -> None:
        """Add rows (B, D). Raises ValueError for values that are not finite."""
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("features hold NaN or infinity; expected finite values.")
        if not len(rows):
            return
        wide = rows.double()
        mean = wide.mean(dim=0)  # (D,)
        offset, centred = mean - self.mean.to(rows.device), wide - mean
        total = self.count + len(rows)
        between = torch.outer(offset, offset) * (self.count * len(rows) / total)
        self.products = self.products.to(rows.device) + centred.T @ centred + between
        self.mean = self.mean.to(rows.device) + offset * (len(rows) / total)
        self.count = total

    def statistics(self) -> tuple[Tensor, Tensor, int]:
        """Mean (D,), unbiased covariance (D, D) in float64, and n. Raises ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} images are too few for a Fréchet distance; expected 2 or more.")
        symmetric = (self.products + self.products.T) / 2  # products of matrices are so but for rounding
        return self.mean, symmetric / (self.count - 1), self.count


def reference_from_batches(
    extractor: FeatureExtractor, batches: Iterable[Tensor], *, keep_features: int = KEEP_FEATURES
) -> ReferenceStatistics:
    """Of uint8 images (B, 3, h, w), 2 or more in all; the first `keep_features` feature rows are kept."""
    pool, spatial = Moments(extractor.num_features), Moments(extractor.num_spatial or 0)
    kept, room = [torch.empty(0, extractor.num_features)], keep_features
    for images in batches:
        features = extract_features(extractor, images)
        rows = features.pool.cpu()
        pool.add(rows)
        if features.spatial is not None:
            spatial.add(features.spatial.cpu())
        kept.append(rows[:room].float())
        room -= len(kept[-1])
    mean, covariance, count = (np.asarray(value) for value in pool.statistics())
    mu_s, sigma_s = (np.asarray(v) for v in spatial.statistics()[:2]) if extractor.num_spatial else (None, None)
    return ReferenceStatistics(mean, covariance, int(count), mu_s, sigma_s, torch.cat(kept).numpy())


def load_reference(path: str | Path, extractor: FeatureExtractor | None = None) -> ReferenceStatistics:
    """Read an .npz with mu, sigma (and mu_s, sigma_s, features, n) or with images arr_0 (m, h, w, 3) uint8, or both.

    Moments in the file win over its images, as in the ADM evaluator; the images then only give feature rows.

    Without an extractor images are ignored.

    Raises:
        ValueError: no such file, not an .npz, no moments and no images, images without an extractor, or moments of
            another size than the extractor's features.
    """
    file = Path(path).expanduser()
    names = {field.name for field in fields(ReferenceStatistics)}
    arrays: dict[str, Any] = read_arrays(file, names=names if extractor is None else {*names, IMAGES})
    for name, values in arrays.items():
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{name} of {file} holds {values.dtype}; expected numbers.")
    images = arrays.pop(IMAGES, None)
    if extractor is not None and images is not None and not {"mu", "sigma", "features"} <= arrays.keys():
        computed = vars(reference_from_batches(extractor, _batches(images, file)))
        arrays = {"features": computed["features"], **arrays} if "mu" in arrays else computed
    if "mu" not in arrays:
        raise ValueError(f"{file} holds no moments; expected mu and sigma, or images {IMAGES} and a feature extractor.")
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in arrays) != (covariance in arrays):
            raise ValueError(f"{file} has a mean without its covariance or the reverse: {sorted(arrays)}.")
        if arrays.get(mean) is not None:
            checked = check_moments(arrays[mean], arrays[covariance], str(file))
            arrays[mean], arrays[covariance] = (values.numpy() for values in checked)
    if extractor is not None and len(arrays["mu"]) != extractor.num_features:
        raise ValueError(
            f"{file} holds moments of {len(arrays['mu'])} features; expected {extractor.num_features}, as the "
            "extractor gives."
        )
    if "features" in arrays:
        rows = arrays["features"] = arrays["features"].astype(np.float32)
        if rows.ndim != 2 or rows.shape[1] != len(arrays["mu"]) or not np.isfinite(rows).all():
            raise ValueError(
                f"features of {file} are {rows.shape}; expected finite rows of {len(arrays['mu'])} columns."
            )
    if "n" in arrays:
        count = np.asarray(arrays["n"])
        if count.size != 1 or not 2 <= count.item() < 2**53:
            raise ValueError(f"n of {file} is {str(count)[:80]}; expected the number of images, 2 or more.")
        arrays["n"] = int(count.item())
    return ReferenceStatistics(**arrays)


def _batches(images: np.ndarray, file: Path) -> Iterator[Tensor]:
    """Images (m, h, w, 3) as tensors (B, 3, h, w)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{IMAGES} of {file} is {images.dtype} {images.shape}; expected uint8 images (m, h, w, 3).")
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images[start : start + BATCH].transpose(0, 3, 1, 2).copy())
