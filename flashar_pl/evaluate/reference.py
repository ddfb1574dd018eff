"""The real images that samples are compared with: an .npz, a directory of images, or shards of codes.

Shapes: m reference images of h x w pixels.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.files import BROKEN, reason
from flashar_pl.files import digest as digest_of

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.metrics.extractor import FeatureExtractor
    from flashar_pl.metrics.reference import ReferenceStatistics

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMAT = 1
"""Of stored statistics."""
ORDER_SEED = 0
"""Of the order in which images are read: the first 10,000 serve precision and recall and must not be a few classes."""


@dataclass(frozen=True)
class Reference:
    """Statistics and where they come from."""

    statistics: ReferenceStatistics
    side: tuple[int, int] | None
    """(h, w) of the images; None = not known."""
    facts: dict[str, Any]
    """Plain values for the report."""


def load_reference_images(
    path: str,
    split: str,
    extractor: FeatureExtractor,
    *,
    tokenizer: str | dict[str, Any] | None = None,
    batch_size: int = 64,
    cache: str | Path | None = None,
) -> Reference:
    """Reference statistics of whatever lies at `path`; what has to be computed is stored in `cache`.

    Args:
        path: an .npz with moments or images, a directory with manifest.json (shards), or a directory of images.
        split: of shards.
        tokenizer: decodes the shards' codes; None = the one their manifest names.
        cache: directory; None = references/ below the user's cache directory.

    Raises:
        ValueError: nothing usable there, images of unequal sizes, no such split.
    """
    from flashar_pl.data.locations import default_cache, is_remote

    place = Path(path).expanduser()
    folder = Path(cache) if cache is not None else default_cache() / "references"
    if is_remote(path) or (place / "manifest.json").is_file():
        return _from_shards(path, split, extractor, tokenizer, batch_size, folder)
    if place.is_dir():
        return _from_images(place, extractor, batch_size, folder)
    return _from_npz(place, extractor, batch_size, folder)


def _from_npz(file: Path, extractor: FeatureExtractor, batch_size: int, cache: Path) -> Reference:
    from flashar_pl.metrics.reference import load_reference

    if not file.is_file():
        raise ValueError(
            f"no reference at {file}; expected an .npz such as VIRTUAL_imagenet256_labeled.npz, a directory of images, "
            "or a directory of shards."
        )
    arrays = _array_shapes(file)
    digest = digest_of(file)
    facts = {"kind": "npz", "path": str(file), "sha256": digest, "arrays": {k: list(v) for k, v in arrays.items()}}
    if "arr_0" in arrays and not {"mu", "sigma", "features"} <= arrays.keys():

        def build() -> ReferenceStatistics:
            return load_reference(file, extractor, batch_size=batch_size)

        statistics = cached_reference(cache, {"file": digest}, extractor, build)
    else:
        statistics = load_reference(file, extractor, batch_size=batch_size)
    shape = arrays.get("arr_0", ())
    return Reference(statistics, (shape[1], shape[2]) if len(shape) == 4 else None, facts | _counts(statistics))


def _array_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an .npz, from their headers alone."""
    from numpy.lib import format as npy

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
                    shapes[name.removesuffix(".npy")] = read(stream)[0]
    except BROKEN as error:
        raise ValueError(f"{file} is not a file of arrays that can be read: {reason(error)}") from error
    return shapes


def _from_images(folder: Path, extractor: FeatureExtractor, batch_size: int, cache: Path) -> Reference:
    import numpy as np

    from flashar_pl.metrics.reference import reference_from_batches

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}) and no manifest.json; expected a "
            "directory of at least 2 images, or of shards."
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {digest_of(file)}\n".encode())
    side = _read_image(files[0]).shape[:2]

    def batches() -> Iterator[Tensor]:
        import torch

        order = np.random.default_rng(ORDER_SEED).permutation(len(files))
        for start in range(0, len(files), batch_size):
            chosen = [files[i] for i in order[start : start + batch_size]]
            arrays = [_read_image(file) for file in chosen]
            for file, array in zip(chosen, arrays):
                if array.shape[:2] != side:
                    raise ValueError(
                        f"{file} has {array.shape[0]} x {array.shape[1]} pixels, {files[0]} {side[0]} x {side[1]}; "
                        "expected reference images of one size: crop and resize them first."
                    )
            yield torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())  # (B, 3, h, w)

    key = {"images": digest.hexdigest()}
    statistics = cached_reference(cache, key, extractor, lambda: reference_from_batches(extractor, batches()))
    facts = {"kind": "images", "path": str(folder), "sha256": digest.hexdigest()}
    return Reference(statistics, (side[0], side[1]), facts | _counts(statistics))


def _read_image(file: Path) -> Any:
    """Pixels (h, w, 3) uint8 of an image file."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error


def _from_shards(
    path: str,
    split: str,
    extractor: FeatureExtractor,
    tokenizer: str | dict[str, Any] | None,
    batch_size: int,
    cache: Path,
) -> Reference:
    import numpy as np
    import torch

    from flashar_pl.data.reader import ShardReader
    from flashar_pl.data.shards import Manifest
    from flashar_pl.metrics.extractor import device_of
    from flashar_pl.metrics.reference import reference_from_batches
    from flashar_pl.options import parse_tokenizer
    from flashar_pl.tokenizers import build_tokenizer

    manifest = Manifest.load(path)
    manifest.shards(split)
    config = parse_tokenizer(tokenizer) or manifest.tokenizer
    decoder = build_tokenizer(config)
    side = (manifest.grid[0] * decoder.downsample, manifest.grid[1] * decoder.downsample)

    def batches() -> Iterator[Tensor]:
        device = device_of(extractor)
        decoder.to(device)
        reader = ShardReader(manifest, split)
        order = np.random.default_rng(ORDER_SEED).permutation(len(reader))
        for start in range(0, len(order), batch_size):
            codes = torch.from_numpy(reader.read(order[start : start + batch_size]).codes)
            yield decoder.decode(codes.to(device))  # (B, 3, h, w)

    facts = {
        "kind": "shards",
        "path": path,
        "name": manifest.name,
        "split": split,
        "fingerprint": manifest.fingerprint(split),
        "crop": manifest.evaluation_crop,
        "tokenizer": tokenizer_identity(config),
    }
    key = {name: facts[name] for name in ("fingerprint", "crop", "tokenizer")}
    statistics = cached_reference(cache, key, extractor, lambda: reference_from_batches(extractor, batches()))
    return Reference(statistics, side, facts | _counts(statistics))


def cached_reference(
    folder: Path, description: dict[str, Any], extractor: FeatureExtractor, build: Callable[[], ReferenceStatistics]
) -> ReferenceStatistics:
    """Statistics stored in `folder` under a hash of `description` and the extractor's weights; built where missing.

    description: plain values that fix the images, such as {"file": sha256}.
    """
    from flashar_pl.metrics.reference import load_reference

    key = json.dumps({"format": FORMAT, "of": description, "extractor": extractor.fingerprint()}, sort_keys=True)
    file = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    if not file.is_file():
        build().save(file)
    return load_reference(file)


def _counts(statistics: ReferenceStatistics) -> dict[str, Any]:
    rows = statistics.features
    return {"images": statistics.n, "feature_rows": None if rows is None else len(rows)}


def tokenizer_identity(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with hashes in place of paths."""
    identity = dict(config)
    for key in ("weights", "settings"):
        value = config.get(key)
        if isinstance(value, str) and Path(value).expanduser().exists():
            file = Path(value).expanduser()
            identity[key] = f"sha256:{digest_of(file) if file.is_file() else directory_digest(file)}"
    return identity


def path_digest(path: str | Path) -> str:
    """sha256 of a file, or of the names and hashes of a directory's files."""
    place = Path(path).expanduser()
    return digest_of(place) if place.is_file() else directory_digest(place)


def directory_digest(folder: Path) -> str:
    """sha256 of the names and hashes of a model directory's files; model cards and hidden files do not count."""
    names = {file: str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()}
    hidden = {file for file, name in names.items() if name.startswith(".") or "/." in name or file.suffix == ".md"}
    listed = {name: digest_of(file) for file, name in names.items() if file not in hidden}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
