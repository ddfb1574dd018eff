"""Reference statistics: the moments and feature rows of real images that samples are compared with.

The file layout is the ADM evaluator's .npz (mu, sigma, mu_s, sigma_s, arr_0), so its reference batches load as they are
and files written here serve its FID and sFID.

Shapes: m reference images of h x w pixels, D pooled features, S spatial features, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flashar_pl.files import read_arrays, replacing
from flashar_pl.metrics.distribution import check_moments
from flashar_pl.metrics.extractor import FeatureExtractor, extract_features

KEEP_FEATURES = 10_000
"""Rows kept for precision, recall and KID, as many as the ADM reference batches hold."""
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
    """Sums over feature rows in float64: mean and covariance, however many batches or ranks the rows come from."""

    def __init__(self, columns: int) -> None:
        self.products = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)
        """(D + 1, D + 1): sum of the outer products of (1, row). Those of several ranks may be added."""

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
        wide = torch.nn.functional.pad(rows.double(), (1, 0), value=1.0)  # (B, D + 1)
        self.products = self.products.to(rows.device) + wide.T @ wide

    def statistics(self) -> tuple[Tensor, Tensor, int]:
        """Mean (D,), unbiased covariance (D, D) in float64, and n. Raises ValueError for fewer than 2 rows."""
        count = int(self.products[0, 0])
        if count < 2:
            raise ValueError(f"{count} images are too few for a Fréchet distance; expected 2 or more.")
        mean = self.products[0, 1:] / count
        return mean, (self.products[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1), count


def reference_from_batches(
    extractor: nn.Module, batches: Iterable[Tensor], *, keep_features: int = KEEP_FEATURES
) -> ReferenceStatistics:
    """Statistics of batches of uint8 images (B, 3, h, w); the first `keep_features` feature rows are kept.

    Raises:
        ValueError: fewer than 2 images in all, or images that are not uint8.
    """
    columns = int(extractor.num_features)  # type: ignore[arg-type]
    second = extractor.num_spatial if isinstance(extractor, FeatureExtractor) else None
    pool, spatial = Moments(columns), Moments(second or 0)
    kept, room = [torch.empty(0, columns)], keep_features
    for images in batches:
        features = extract_features(extractor, images)
        rows = features.pool.cpu()
        pool.add(rows)
        if features.spatial is not None:
            spatial.add(features.spatial.cpu())
        kept.append(rows[:room].float())
        room -= len(kept[-1])
    mean, covariance, count = (np.asarray(value) for value in pool.statistics())
    others = [np.asarray(value) for value in spatial.statistics()[:2]] if second else [None, None]
    stored = torch.cat(kept).numpy() if keep_features else None
    return ReferenceStatistics(mean, covariance, int(count), others[0], others[1], stored)


def load_reference(path: str | Path, extractor: nn.Module | None = None, batch_size: int = 64) -> ReferenceStatistics:
    """Read an .npz with mu, sigma (and mu_s, sigma_s, features, n) or with images arr_0 (m, h, w, 3) uint8, or both.

    Moments in the file win over its images, as in the ADM evaluator; the images then only give feature rows.

    Args:
        extractor: needed where moments are missing; without it images are ignored and precision, recall and KID are
            not available.

    Raises:
        ValueError: no such file, not an .npz, no moments and no images, images without an extractor, or moments of
            another size than the extractor's features.
    """
    file = Path(path).expanduser()
    names = {field.name for field in fields(ReferenceStatistics)}
    arrays = read_arrays(file, names=names if extractor is None else {*names, IMAGES})
    images = arrays.pop(IMAGES, None)
    fresh = None
    if extractor is not None and images is not None and not {"mu", "sigma", "features"} <= arrays.keys():
        fresh = reference_from_batches(extractor, _batches(images, batch_size, file))
    if "mu" in arrays:
        return _from_arrays(arrays, fresh, extractor, file)
    if fresh is None:
        raise ValueError(f"{file} holds no moments; expected mu and sigma, or images {IMAGES} and a feature extractor.")
    return fresh


def _from_arrays(
    arrays: dict[str, np.ndarray], fresh: ReferenceStatistics | None, extractor: nn.Module | None, file: Path
) -> ReferenceStatistics:
    if "sigma" not in arrays or ("mu_s" in arrays) != ("sigma_s" in arrays):
        raise ValueError(f"{file} has a mean without its covariance or the reverse: {sorted(arrays)}.")
    mean, covariance = check_moments(arrays["mu"], arrays["sigma"], str(file))
    if extractor is not None and len(mean) != extractor.num_features:
        raise ValueError(
            f"{file} holds moments of {len(mean)} features; expected {extractor.num_features}, as the extractor gives."
        )
    second = check_moments(arrays["mu_s"], arrays["sigma_s"], str(file)) if "mu_s" in arrays else None
    features = arrays.get("features", fresh.features if fresh is not None else None)
    return ReferenceStatistics(
        mu=mean.numpy(),
        sigma=covariance.numpy(),
        n=int(arrays["n"]) if "n" in arrays else None,
        mu_s=None if second is None else second[0].numpy(),
        sigma_s=None if second is None else second[1].numpy(),
        features=None if features is None else features.astype(np.float32),
    )


def _batches(images: np.ndarray, batch_size: int, file: Path) -> Iterator[Tensor]:
    """Images (m, h, w, 3) as tensors (B, 3, h, w)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{IMAGES} of {file} is {images.dtype} {images.shape}; expected uint8 images (m, h, w, 3).")
    for start in range(0, len(images), batch_size):
        yield torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2)))
