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
from flashar_pl.metrics.fid import FrechetDistance

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


def reference_from_batches(
    extractor: nn.Module, batches: Iterable[Tensor], *, keep_features: int = KEEP_FEATURES
) -> ReferenceStatistics:
    """Statistics of batches of uint8 images (B, 3, h, w); the first `keep_features` feature rows are kept.

    Raises:
        ValueError: fewer than 2 images in all, or images that are not uint8.
    """
    pool = FrechetDistance(int(extractor.num_features), sync_on_compute=False)  # type: ignore[arg-type]
    columns = extractor.num_spatial if isinstance(extractor, FeatureExtractor) else None
    spatial = FrechetDistance(columns, sync_on_compute=False) if columns else None
    kept, room = [torch.empty(0, pool.columns)], keep_features
    for images in batches:
        features = extract_features(extractor, images)
        rows = features.pool.cpu()
        pool.update(rows, real=True)
        if spatial is not None and features.spatial is not None:
            spatial.update(features.spatial.cpu(), real=True)
        kept.append(rows[:room].float())
        room -= len(kept[-1])
    mean, covariance, count = pool.moments(real=True)
    second = (None, None) if spatial is None else [moment.numpy() for moment in spatial.moments(real=True)[:2]]
    stored = torch.cat(kept).numpy() if keep_features else None
    return ReferenceStatistics(mean.numpy(), covariance.numpy(), count, second[0], second[1], stored)


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
