"""Reference statistics: the moments and feature rows of real images that samples are compared with.

The file layout is the ADM evaluator's .npz (mu, sigma, mu_s, sigma_s, arr_0), so its reference batches load as they are
and files written here serve its FID and sFID.

Shape legend: m reference images, D pooled features, S spatial features.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flashar_pl.metrics.distribution import check_moments
from flashar_pl.metrics.extractor import FeatureExtractor, check_images, extract_features
from flashar_pl.metrics.fid import FrechetDistance

KEEP_FEATURES = 10_000  # rows kept for precision, recall and KID, as many as the ADM reference batches hold
FORMAT = 1


@dataclass(frozen=True)
class ReferenceStatistics:
    """Float64 moments of real images, optional spatial moments (sFID) and feature rows (precision, recall, KID)."""

    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D), unbiased
    n: int | None = None  # images behind the moments; None: not known
    mu_s: np.ndarray | None = None  # (S,)
    sigma_s: np.ndarray | None = None  # (S, S)
    features: np.ndarray | None = None  # (m, D) float32
    digest: str = ""  # sha256 of the images or the file this was made from

    def save(self, path: Path | str) -> Path:
        """Write an .npz: to a temporary name, then renamed."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mu": self.mu, "sigma": self.sigma, "digest": np.array(self.digest), "format": np.array(FORMAT)}
        optional = {"mu_s": self.mu_s, "sigma_s": self.sigma_s, "features": self.features, "n": self.n}
        arrays |= {name: np.asarray(value) for name, value in optional.items() if value is not None}
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, target)
        return target


@torch.no_grad()
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
    kept: list[Tensor] = []
    digest = hashlib.sha256()
    room = keep_features
    for images in batches:
        _add_to_digest(digest, check_images(images))
        features = extract_features(extractor, images)
        rows = features.pool.cpu()
        pool.update_features(rows, real=True)
        if spatial is not None and features.spatial is not None:
            spatial.update_features(features.spatial.cpu(), real=True)
        if room > 0:
            kept.append(rows[:room].float())
            room -= len(kept[-1])
    mean, covariance, count = pool.moments(real=True)
    second = spatial.moments(real=True) if spatial is not None else None
    return ReferenceStatistics(
        mu=mean.numpy(),
        sigma=covariance.numpy(),
        n=count,
        mu_s=None if second is None else second[0].numpy(),
        sigma_s=None if second is None else second[1].numpy(),
        features=torch.cat(kept).numpy() if kept else None,
        digest=digest.hexdigest(),
    )


def reference_from_images(
    extractor: nn.Module, images: Tensor, *, batch_size: int = 64, keep_features: int = KEEP_FEATURES
) -> ReferenceStatistics:
    """Statistics of uint8 images (m, 3, h, w)."""
    return reference_from_batches(extractor, check_images(images).split(batch_size), keep_features=keep_features)


def load_reference(
    path: Path | str, extractor: nn.Module | None = None, *, batch_size: int = 64
) -> ReferenceStatistics:
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
    if not file.is_file():
        raise ValueError(f"no reference statistics at {file}: expected an .npz with mu and sigma or with images arr_0")
    try:
        with np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            arrays = {name: archive[name] for name in _MOMENTS if name in names}
            images = archive["arr_0"] if "arr_0" in names and extractor is not None else None
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not a readable .npz: {error}") from error
    if "mu" not in arrays and images is None:
        hint = "give a feature extractor to use its images" if "arr_0" in names else "it has neither mu nor arr_0"
        raise ValueError(f"{file} holds no moments (mu, sigma): {hint}")
    fresh = None
    if images is not None and not {"mu", "sigma", "features"} <= set(arrays):
        assert extractor is not None
        fresh = reference_from_batches(extractor, _image_batches(images, batch_size, file))
    if "mu" not in arrays:
        assert fresh is not None
        return fresh
    return _from_arrays(arrays, fresh, extractor, file)


_MOMENTS = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "digest")


def _from_arrays(
    arrays: dict[str, np.ndarray], fresh: ReferenceStatistics | None, extractor: nn.Module | None, file: Path
) -> ReferenceStatistics:
    if "sigma" not in arrays or ("mu_s" in arrays) != ("sigma_s" in arrays):
        raise ValueError(f"{file} has a mean without its covariance or the reverse: {sorted(arrays)}")
    mean, covariance = check_moments(arrays["mu"], arrays["sigma"], str(file))
    if extractor is not None and len(mean) != extractor.num_features:
        raise ValueError(f"{file} holds moments of {len(mean)} features, the extractor gives {extractor.num_features}")
    second = check_moments(arrays["mu_s"], arrays["sigma_s"], str(file)) if "mu_s" in arrays else None
    features = arrays.get("features", fresh.features if fresh is not None else None)
    return ReferenceStatistics(
        mu=mean.numpy(),
        sigma=covariance.numpy(),
        n=int(arrays["n"]) if "n" in arrays else None,
        mu_s=None if second is None else second[0].numpy(),
        sigma_s=None if second is None else second[1].numpy(),
        features=None if features is None else features.astype(np.float32),
        digest=str(arrays["digest"]) if "digest" in arrays else file_digest(file),
    )


def cached_reference(
    folder: Path | str,
    description: Mapping[str, object],
    extractor: FeatureExtractor,
    build: Callable[[], ReferenceStatistics],
) -> ReferenceStatistics:
    """Statistics stored in `folder` under a hash of `description` and the extractor's weights; built where missing.

    Args:
        description: plain values that fix the images, such as {"manifest": sha256, "split": "test"} or
            {"file": file_digest(path)}.
        build: called once where there is no stored result.
    """
    key = json.dumps({"format": FORMAT, "of": dict(description), "extractor": extractor.fingerprint()}, sort_keys=True)
    file = Path(folder) / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    if file.is_file():
        return load_reference(file)
    statistics = build()
    statistics.save(file)
    return statistics


def file_digest(path: Path | str) -> str:
    """sha256 of a file, as hexadecimal text."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _add_to_digest(digest: "hashlib._Hash", images: Tensor) -> None:
    """Image by image, so that the hash does not depend on the batch size."""
    for image in images.cpu():
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())


def _image_batches(images: np.ndarray, batch_size: int, file: Path) -> Iterator[Tensor]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"arr_0 of {file} must be uint8 images (m, h, w, 3), got {images.dtype} {images.shape}")
    for start in range(0, len(images), batch_size):
        part = np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2))
        yield torch.from_numpy(part)
