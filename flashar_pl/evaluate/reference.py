"""The real images that samples are compared with: an .npz, a directory of images, or shards of codes.

Shapes: m reference images of h x w pixels, B of a batch.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.checkpoints.named_paths import typed_tokenizer
from flashar_pl.data.account import Account
from flashar_pl.data.encode import check_own
from flashar_pl.data.folders import list_images
from flashar_pl.data.images import centre_crop
from flashar_pl.data.locations import is_remote
from flashar_pl.data.reader import ShardReader
from flashar_pl.data.shards import Manifest
from flashar_pl.evaluate.identity import tokenizer_identity
from flashar_pl.files import default_cache, digest
from flashar_pl.image_files import EXTENSIONS, Unreadable, open_rgb
from flashar_pl.metrics.extractor import FeatureExtractor, device_of
from flashar_pl.metrics.reference import BATCH, IMAGES, ReferenceStatistics, load_reference, reference_from_batches
from flashar_pl.options import parse_tokenizer
from flashar_pl.tensor_files import array_header
from flashar_pl.text_files import BROKEN, reason
from flashar_pl.tokenizers import build_tokenizer

FORMAT = 1
"""Of stored statistics."""
READER = 2
"""Of image files: 1 took other pixels of 16-bit greys, transparency and turned pictures."""
ORDER_SEED = 0
"""Of the order in which images are read: the first 10,000 serve precision and recall and must not be a few classes."""


@dataclass
class Reference:
    """Reference images; before they are looked at, without statistics."""

    facts: dict[str, Any]
    """Plain values for the report: where they come from, and how many."""
    side: tuple[int, int] | None
    """(h, w) of the images; None = not known."""
    key: dict[str, Any] | None
    """Plain values that fix the images, such as {"file": sha256}; None = nothing worth a cache is computed."""
    compute: Callable[[], ReferenceStatistics]
    statistics: ReferenceStatistics = field(init=False)


def load_reference_images(
    path: str,
    split: str,
    extractor: FeatureExtractor,
    *,
    tokenizer: str | dict[str, Any] | None = None,
    cache: str | Path | None = None,
    crop: int | None = None,
) -> Reference:
    """Reference statistics of whatever lies at `path`; what has to be computed is stored in `cache`.

    Args:
        path: an .npz with moments or images, a directory with manifest.json (shards), or a directory of images.
        split: of shards.
        tokenizer: decodes the shards' codes; None = the one their manifest names.
        cache: directory; None = references/ below the user's cache directory. Statistics are stored there under a hash
            of the images and the extractor's weights.
        crop: of a directory of images, the side in pixels of the centre squares that are taken of them; None = they are
            taken as they are.

    Raises:
        ValueError: nothing usable there, images of unequal sizes that are not cropped, no such split, or a crop of what
            is no directory of images.
    """
    place = Path(path).expanduser()
    shards = is_remote(path) or (place / "manifest.json").is_file()
    if crop is not None and (shards or not place.is_dir()):
        raise ValueError(f"--reference-crop is for a directory of images; {path} is none. Leave it out.")
    if shards:
        found = _from_shards(path, split, extractor, tokenizer)
    else:
        found = _from_images(place, extractor, crop) if place.is_dir() else _from_npz(place, extractor)
    if found.key is None:
        found.statistics = found.compute()
    else:
        folder = Path(cache) if cache is not None else default_cache() / "references"
        key = json.dumps({"format": FORMAT, "of": found.key, "extractor": extractor.fingerprint()}, sort_keys=True)
        file = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
        if not file.is_file():
            found.compute().save(file)
        found.statistics = load_reference(file)
    rows = found.statistics.features
    found.facts |= {"images": found.statistics.n, "feature_rows": None if rows is None else len(rows)}
    return found


def _from_npz(file: Path, extractor: FeatureExtractor) -> Reference:
    if not file.is_file():
        raise ValueError(
            f"no reference at {file}; expected an .npz such as VIRTUAL_imagenet256_labeled.npz, a directory of images, "
            "or a directory of shards."
        )
    arrays, sha256 = _array_shapes(file), digest(file)
    facts = {"kind": "npz", "path": str(file), "sha256": sha256, "arrays": {k: list(v) for k, v in arrays.items()}}
    computes = IMAGES in arrays and not {"mu", "sigma", "features"} <= arrays.keys()
    shape = arrays.get(IMAGES, ())
    side = (shape[1], shape[2]) if len(shape) == 4 else None
    return Reference(facts, side, {"file": sha256} if computes else None, lambda: load_reference(file, extractor))


def _array_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an .npz, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as stream:
                    shapes[member.filename.removesuffix(".npy")] = array_header(stream, member.file_size)[0]
    except BROKEN as error:
        raise ValueError(f"{file} is not an .npz that can be read: {reason(error)}.") from error
    return shapes


def _from_images(folder: Path, extractor: FeatureExtractor, crop: int | None) -> Reference:
    account = Account()
    files = sorted(folder / name for name in list_images(folder, account))
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds {len(files)} images ({', '.join(EXTENSIONS)}) and no manifest.json; expected a directory "
            f"of at least 2 images, or of shards ({account})."
        )
    listed = "".join(f"{file.relative_to(folder)} {digest(file)}\n" for file in files)
    sha256 = hashlib.sha256(listed.encode()).hexdigest()
    side = _read_image(files[0], crop).shape[:2]

    def batches() -> Iterator[Tensor]:
        for numbers in _shuffled(len(files)):
            arrays = [_read_image(files[i], crop) for i in numbers]
            for i, array in zip(numbers, arrays):
                if array.shape[:2] != side:
                    raise ValueError(
                        f"{files[i]} has {array.shape[0]} x {array.shape[1]} pixels, {files[0]} {side[0]} x {side[1]}; "
                        "expected reference images of one size: --reference-crop centre takes the centre squares."
                    )
            yield torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())  # (B, 3, h, w)

    facts: dict[str, Any] = {"kind": "images", "path": str(folder), "sha256": sha256, **account.facts}
    key: dict[str, Any] = {"images": sha256, "reader": READER}
    if crop is not None:
        key["crop"] = facts["crop"] = f"centre square of {crop} pixels"
    return Reference(facts, (side[0], side[1]), key, lambda: reference_from_batches(extractor, batches()))


def _shuffled(n: int) -> list[np.ndarray]:
    """The numbers 0 .. n - 1 in a fixed order, batch by batch."""
    order = np.random.default_rng(ORDER_SEED).permutation(n)
    return [order[start : start + BATCH] for start in range(0, n, BATCH)]


def _read_image(file: Path, crop: int | None) -> np.ndarray:
    """Pixels (h, w, 3) uint8 of an image file, or of its centre square."""
    try:
        image = open_rgb(file)
        return np.asarray(image) if crop is None else centre_crop(image, crop).transpose(1, 2, 0)
    except Unreadable as error:
        raise ValueError(f"{file} is not a readable image: {error}.") from error


def _from_shards(
    path: str, split: str, extractor: FeatureExtractor, tokenizer: str | dict[str, Any] | None
) -> Reference:
    manifest = Manifest.load(path)
    manifest.shards(split)
    config = parse_tokenizer(tokenizer)
    if config is None:
        check_own(manifest, f"add {typed_tokenizer(manifest.tokenizer)}")
        config = manifest.tokenizer
    decoder = build_tokenizer(config)

    def batches() -> Iterator[Tensor]:
        device = device_of(extractor)
        decoder.to(device)
        reader = ShardReader(manifest, split)
        for numbers in _shuffled(len(reader)):
            yield decoder.decode(torch.from_numpy(reader.read(numbers).codes).to(device))  # (B, 3, h, w)

    key = {
        "fingerprint": manifest.fingerprint(split),
        "crop": manifest.evaluation_crop,
        "tokenizer": tokenizer_identity(config),
    }
    side = (manifest.grid[0] * decoder.downsample, manifest.grid[1] * decoder.downsample)
    facts = {"kind": "shards", "path": path, "name": manifest.name, "split": split, **key}
    return Reference(facts, side, key, lambda: reference_from_batches(extractor, batches()))
