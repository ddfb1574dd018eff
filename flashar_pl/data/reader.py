"""Reading code shards by offset: any samples of a split, in any order, without scanning a tar.

Shards are mapped into memory, so a sample costs its own bytes only, and workers share the page cache.

Shapes: n samples asked for, m samples of a record, K crops, H x W grid, T text length, C feature width.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from flashar_pl.data.first_use import FirstUse, check_size
from flashar_pl.data.manifest import Manifest, Record, code_dtype
from flashar_pl.tensor_files import array_header
from flashar_pl.text_files import BROKEN, parse_json, reason

OPEN_SHARDS = 128
"""Shards a reader keeps mapped, each with one file descriptor and what is known of its records."""
Row = tuple[dict[str, Any], int, int]
"""Members of a record as `read_record` gives them, number of a sample in it, crop."""


@dataclass(frozen=True)
class Samples:
    """Samples as numpy arrays; exactly one kind of condition is set."""

    codes: np.ndarray
    """(n, H, W) int64."""
    ids: np.ndarray
    """(n,) int64, numbers of the samples in their source."""
    labels: np.ndarray | None = None
    """(n,) int64."""
    texts: list[str] | None = None
    features: np.ndarray | None = None
    """(n, T, C) float32, left-padded with zeros to the manifest's length T."""
    mask: np.ndarray | None = None
    """(n, T) bool, True = valid."""
    previews: np.ndarray | None = None
    """(n, h, w) int64, as in the manifest."""

    @classmethod
    def joined(cls, parts: list[Samples], order: np.ndarray) -> Samples:
        """The samples of several parts of one kind, one after the other, then in the order (n,) of their places."""

        def field(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], list):
                texts = list(itertools.chain(*values))
                return [texts[i] for i in order]
            return None if values[0] is None else np.concatenate(values)[order]

        return cls(**{each.name: field(each.name) for each in fields(cls)})


class ShardReader:
    """Random access to the samples of one split, numbered 0 .. len - 1 in the order of the manifest.

    Files are opened when first needed, so a reader can be sent to worker processes. `cache` is the directory for copies
    of remote shards, None the user's cache directory. `verify`: compare each shard with its hash before its first
    sample is given; a `FirstUse` does it for several readers. Raises ValueError if the split does not exist.
    """

    def __init__(
        self, manifest: Manifest, split: str, cache: str | None = None, verify: bool | FirstUse = True
    ) -> None:
        self.manifest, self.split, self.cache = manifest, split, cache
        self._first_use = FirstUse(manifest, cache) if verify is True else verify
        self._ahead = False
        self._shards = {shard.path: shard for shard in manifest.shards(split)}
        self._records = [(shard, record) for shard in manifest.shards(split) for record in shard.records]
        self._starts = np.concatenate([[0], np.cumsum(manifest.block_sizes(split))])  # (M + 1,)
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.manifest, self.split, self.cache, self._first_use)

    def read(self, positions: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        """The samples at `positions`, in that order.

        Args:
            positions: (n,) int64, sample numbers within the split.
            crops: (n,) int64, which crop of each; None = the manifest's evaluation crop.

        Raises:
            ValueError: a shard is missing, truncated or damaged, or holds a code outside the vocabulary; a shard that
                `verify_ahead` has looked at is not as the manifest says.
        """
        blocks = np.searchsorted(self._starts, positions, side="right") - 1  # (n,)
        numbers = positions - self._starts[blocks]  # (n,)
        chosen = np.full(len(positions), self.manifest.evaluation_crop) if crops is None else crops
        records = [self._record(block) for block in blocks.tolist()]
        samples = gather(self.manifest, list(zip(records, numbers.tolist(), chosen.tolist(), strict=True)))
        worst = int(samples.codes.max(axis=(1, 2)).argmax())
        check_codes(samples.codes[worst], self.manifest, self._path(int(blocks[worst])))
        if self._first_use:
            self._first_use.check(self._records[block][0] for block in set(blocks.tolist()))
        return samples

    def verify_ahead(self) -> None:
        """Begin to verify the whole split, once in each process: for readers that will need most of it."""
        if self._first_use and not self._ahead:
            self._ahead = True
            self._first_use.check_ahead(self.split)

    def _path(self, block: int) -> str:
        return self.manifest.local_path(self._records[block][0], self.cache)

    def _open_shard(self, name: str) -> tuple[str, mmap.mmap, dict[int, dict[str, Any]]]:
        """Path and content of a shard, and its records read so far by number: views of the content."""
        shard = self._shards[name]
        path = self.manifest.local_path(shard, self.cache)
        return path, map_shard(path, shard.bytes), {}

    def _record(self, block: int) -> dict[str, Any]:
        """The members of a record, as views of the mapped file, checked against the manifest."""
        shard, record = self._records[block]
        path, content, known = self._open(shard.path)
        if block not in known:
            known[block] = read_record(self.manifest, cut_members(content, record), path, record.samples)
        return known[block]


def map_shard(path: str, size: int) -> mmap.mmap:
    """Map a shard into memory. Raises ValueError if it is missing or has not `size` bytes."""
    check_size(path, size)
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_codes(codes: np.ndarray, manifest: Manifest, path: str) -> None:
    """Raises ValueError if one of `codes` (any shape), read from `path`, is outside the vocabulary."""
    if codes.max() >= manifest.vocabulary:
        raise ValueError(
            f"{path} holds the code {codes.max()}, outside the vocabulary of {manifest.vocabulary}: "
            "the shard is damaged. Copy it again, or tokenize the data set again."
        )


def cut_members(data: mmap.mmap, record: Record) -> dict[str, memoryview]:
    """The members of a record, without copying them."""
    whole = memoryview(data)
    return {name: whole[at : at + size] for name, (at, size) in record.members.items()}


def read_record(
    manifest: Manifest, members: Mapping[str, bytes | memoryview], path: str, samples: int | None = None
) -> dict[str, Any]:
    """The members of a record: numpy views, or a list of str for texts; "stops" are the ends of ragged texts.

    Args:
        manifest: of the shards.
        members: name -> content; others than the manifest implies are left out.
        path: of the tar, for errors.
        samples: of the record; None = as many as it has ids.

    Raises:
        ValueError: a member is missing, damaged, or has not the shape and type the manifest implies.
    """
    spec = manifest.condition
    found: dict[str, Any] = {}
    previews = () if manifest.preview is None else ("previews.npy",)
    for name in ("codes.npy", "ids.npy", *previews, *spec.members):
        if name not in members:
            raise ValueError(f"A record of {path} has no {name}, which {manifest.name!r} must have.")
        read = _texts if name == "texts.json" else _array
        found[name] = read(members[name], f"{name} of {path}")
    m = found["ids.npy"].size if samples is None else samples
    _expect(found, path, "codes.npy", (m, manifest.crops, *manifest.grid), code_dtype(manifest.vocabulary).name)
    if manifest.preview is not None:
        shape = (m, manifest.crops, *manifest.preview)
        _expect(found, path, "previews.npy", shape, code_dtype(manifest.vocabulary).name)
        check_codes(found["previews.npy"], manifest, path)
    for name in found.keys() & {"ids.npy", "labels.npy", "lengths.npy"}:
        _expect(found, path, name, (m,), "int64")
    texts = found.get("texts.json", [""] * m)
    if len(texts) != m or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts.json in {path} does not hold {m} captions. Tokenize the data set again.")
    if spec.num_classes is not None:
        _within(found["labels.npy"], 0, spec.num_classes - 1, f"{path} holds labels", f"{spec.num_classes} classes")
    if spec.length is not None:
        _within(found["lengths.npy"], 1, spec.length, f"{path} holds texts of length", f"{spec.length} places")
        found["stops"] = np.cumsum(found["lengths.npy"])  # (m,)
        _expect(found, path, "features.npy", (int(found["stops"][-1]), spec.width), "float16", "float32")
    return found


def _expect(found: dict[str, Any], path: str, name: str, shape: tuple[int | None, ...], *types: str) -> None:
    """Raises ValueError unless an array has this shape and one of these types."""
    if found[name].shape != shape or found[name].dtype.name not in types or not found[name].size:
        raise ValueError(
            f"{name} of {path} has shape {found[name].shape} and type {found[name].dtype}; "
            f"the manifest implies {shape} and {' or '.join(types)}. Tokenize the data set again."
        )


def _within(values: np.ndarray, low: int, high: int, what: str, room: str) -> None:
    """Raises ValueError unless all values (m,) are from low to high."""
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"{what} {values.min()} .. {values.max()}; there are {room}: the shard is damaged. Copy it again, or "
            "tokenize the data set again."
        )


def gather(manifest: Manifest, rows: list[Row]) -> Samples:
    """Rows of any records, in that order."""
    codes = np.stack([record["codes.npy"][row, crop] for record, row, crop in rows]).astype(np.int64)  # (n, H, W)
    ids = np.array([record["ids.npy"][row] for record, row, _ in rows])
    if manifest.preview is not None:
        previews = np.stack([record["previews.npy"][row, crop] for record, row, crop in rows]).astype(np.int64)
        return replace(gather(replace(manifest, preview=None), rows), previews=previews)
    spec = manifest.condition
    if spec.kind == "class":
        return Samples(codes, ids, labels=np.array([record["labels.npy"][row] for record, row, _ in rows]))
    if spec.kind == "text":
        return Samples(codes, ids, texts=[record["texts.json"][row] for record, row, _ in rows])
    assert spec.length is not None
    assert spec.width is not None
    features = np.zeros((len(rows), spec.length, spec.width), dtype=np.float32)  # (n, T, C)
    mask = np.zeros((len(rows), spec.length), dtype=bool)  # (n, T)
    for i, (record, row, _) in enumerate(rows):
        stop = int(record["stops"][row])
        length = int(record["lengths.npy"][row])
        features[i, spec.length - length :] = record["features.npy"][stop - length : stop]
        mask[i, spec.length - length :] = True
    return Samples(codes, ids, features=features, mask=mask)


def _array(data: bytes | memoryview, what: str) -> np.ndarray:
    """A .npy file as a read-only view of `data`."""
    head = io.BytesIO(data[:4096])
    try:
        shape, fortran, dtype = array_header(head, len(data))
        if fortran or head.tell() + math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes do not hold a C-ordered array of shape {shape} and type {dtype}")
        return np.frombuffer(data, dtype, offset=head.tell()).reshape(shape)
    except BROKEN as error:
        raise ValueError(
            f"Damaged {what}: {reason(error)}. Copy the shard again, or tokenize the data set again."
        ) from error


def _texts(data: bytes | memoryview, what: str) -> list[str]:
    try:
        texts = parse_json(bytes(data).decode(), what)
    except ValueError as error:
        raise ValueError(f"Damaged {what}: {error} Copy the shard again.") from error
    if not isinstance(texts, list):
        raise ValueError(f"{what} is no list of captions. Tokenize the data set again.")
    return texts
