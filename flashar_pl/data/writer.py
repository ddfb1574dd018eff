"""Writing code shards: blocks of samples as records of ordinary WebDataset tars, with a manifest beside them.

A record of n samples has these members:

    codes.npy     (n, K, H, W)   smallest unsigned type that holds the vocabulary
    ids.npy       (n,)           int64, number of the sample in its source
    labels.npy    (n,)           int64 class ids                              condition kind "class"
    texts.json    n strings                                                   condition kind "text"
    features.npy  (sum T_i, C)   float16 or float32, one sample after another condition kind "text-features"
    lengths.npy   (n,)           int64 text lengths T_i                       condition kind "text-features"

Shapes: n samples, K crops of an image, H x W grid, T_i length of a text, C feature width.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset

from flashar_pl.data.manifest import SPLITS, Manifest, Record, Shard, code_dtype
from flashar_pl.data.tars import tar_records
from flashar_pl.files import digest, naming_full_disk, new_directory


class ShardWriter:
    """Writes one data set; nothing stands at `out` until `close` has finished.

    Use as a context manager: leaving it normally closes it, leaving it by an exception removes what was written.

    Args:
        out: directory to make; it must not exist.
        block: samples of a record, the unit training shuffles.
        shard_blocks: records of a tar.
        first_shard: number in the name of each split's first tar.
        facts: name, tokenizer, grid, vocabulary, condition and, where they differ from the defaults, crops and
            evaluation_crop of the `Manifest`.

    Raises ValueError where `out` exists or the manifest is wrong.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        block: int = 100,
        shard_blocks: int = 100,
        first_shard: int = 0,
        **facts: Any,
    ) -> None:
        assert block >= 1
        assert shard_blocks >= 1
        self.out = Path(out)
        self.manifest = Manifest(**facts)  # checks the sizes before anything is written; `close` fills in the splits
        self._block, self._shard_blocks, self._first_shard = block, shard_blocks, first_shard
        self._pending: dict[str, list[tuple[Any, ...]]] = {split: [] for split in SPLITS}
        self._open: dict[str, _Tar] = {}
        self._shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self._directory = new_directory(self.out, "shards")
        self.partial = self._directory.__enter__()

    def write(
        self,
        split: str,
        codes: np.ndarray,
        *,
        ids: np.ndarray | Sequence[int],
        labels: np.ndarray | Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
        features: Sequence[np.ndarray] | None = None,
        previews: np.ndarray | None = None,
    ) -> None:
        """Append samples to a split.

        Args:
            split: "train", "validation" or "test".
            codes: (n, K, H, W) integers; (n, H, W) if there is one crop.
            ids: (n,) integers >= 0, each sample's number in its source.
            labels: (n,) class ids, for condition kind "class".
            texts: n captions, for "text".
            features: n arrays (T_i, C) of floats, 1 <= T_i <= length, for "text-features".
            previews: (n, K, h, w) integers, where the manifest has previews.

        Raises ValueError for a wrong shape, type, code, label or kind of condition; then nothing of it is written.
        """
        codes = self._checked_codes("codes", np.asarray(codes), self.manifest.grid)  # (n, K, H, W)
        n, smaller = len(codes), self.manifest.preview
        if (previews is None) != (smaller is None):
            raise ValueError(f"{'no ' if previews is None else ''}previews are given; the manifest has {smaller}.")
        own = [None] * n if smaller is None else self._checked_codes("previews", np.asarray(previews), smaller)
        condition = self._checked_condition(n, labels=labels, texts=texts, features=features)
        pending = self._pending[split]
        pending.extend(zip(codes, _integers("ids", ids, n, None), condition, own, strict=True))
        while len(pending) >= self._block:
            self._write_record(split, pending[: self._block])
            del pending[: self._block]

    def close(self) -> Manifest:
        """Write what is pending and the manifest, and move the directory to `out`. Returns the manifest."""
        for split in SPLITS:
            if self._pending[split]:
                self._write_record(split, self._pending[split])
            if split in self._open:
                self._shards[split].append(self._open.pop(split).close())
        splits = {split: tuple(shards) for split, shards in self._shards.items() if shards}
        if not splits:
            self.abort()
            raise ValueError(f"No sample was written, so there is nothing to put at {self.out}.")
        replace(self.manifest, splits=splits).save(self.partial)
        self._directory.__exit__(None, None, None)
        self.manifest = Manifest.load(self.out)
        return self.manifest

    def abort(self) -> None:
        """Remove everything written so far."""
        for tar in self._open.values():
            tar.file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming_full_disk(self.out):
                if error is not None:
                    raise error
                self.close()
        except BaseException:
            self.abort()
            raise

    def _checked_codes(self, what: str, codes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        manifest = self.manifest
        shape = (manifest.crops, *grid)
        if manifest.crops == 1 and codes.ndim == 3:
            codes = codes[:, None]  # (n, 1, H, W)
        if codes.shape[1:] != shape or codes.dtype.kind not in "iu":
            raise ValueError(
                f"{what} have shape {codes.shape} and type {codes.dtype}; expected integers of shape (n, {shape})."
            )
        if codes.size and (codes.min() < 0 or codes.max() >= manifest.vocabulary):
            raise ValueError(
                f"{what} range over {codes.min()} .. {codes.max()}; "
                f"the vocabulary of {manifest.vocabulary} allows 0 .. {manifest.vocabulary - 1}."
            )
        return codes.astype(code_dtype(manifest.vocabulary))

    def _checked_condition(self, n: int, **columns: Any) -> Iterable[Any]:
        """The one column that is given, with a value for each of n samples."""
        spec = self.manifest.condition
        given = {key: column for key, column in columns.items() if column is not None}
        wanted = {"class": "labels", "text": "texts", "text-features": "features"}[spec.kind]
        if list(given) != [wanted] or len(given[wanted]) != n:
            found = ", ".join(f"{len(column)} {key}" for key, column in given.items()) or "none"
            raise ValueError(f"Condition kind {spec.kind!r} takes {n} {wanted} and nothing else; given: {found}.")
        if spec.kind == "class":
            return _integers("labels", given[wanted], n, spec.num_classes)
        if spec.kind == "text":
            return given[wanted]
        assert spec.length is not None
        rows = [np.asarray(row) for row in given[wanted]]
        for row in rows:
            fits = row.ndim == 2 and row.shape[1] == spec.width and 1 <= len(row) <= spec.length
            if not fits or row.dtype not in (np.float16, np.float32):
                raise ValueError(
                    f"Text features of shape {row.shape} and type {row.dtype}; expected float16 or float32 of shape "
                    f"(1 .. {spec.length}, {spec.width}) for each sample."
                )
        return rows

    def _write_record(self, split: str, samples: list[tuple[Any, ...]]) -> None:
        codes, ids, conditions, previews = zip(*samples, strict=True)
        members = {"codes.npy": _npy(np.stack(codes)), "ids.npy": _npy(np.array(ids))}  # (n, K, H, W), (n,)
        if self.manifest.preview is not None:
            members["previews.npy"] = _npy(np.stack(previews))  # (n, K, h, w)
        kind = self.manifest.condition.kind
        if kind == "class":
            members["labels.npy"] = _npy(np.array(conditions))  # (n,)
        elif kind == "text":
            members["texts.json"] = json.dumps(conditions, ensure_ascii=False).encode()
        else:
            members["features.npy"] = _npy(np.concatenate(conditions))  # (sum T_i, C)
            members["lengths.npy"] = _npy(np.array([len(row) for row in conditions], dtype=np.int64))
        if split not in self._open:
            self._open[split] = _Tar(self.partial, f"{split}-{self._first_shard + len(self._shards[split]):06d}")
        tar = self._open[split]
        tar.write(len(samples), members)
        if len(tar.counts) == self._shard_blocks:
            self._shards[split].append(self._open.pop(split).close())


class _Tar:
    """One tar being written by webdataset."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.path = directory / f"{stem}.tar"
        self.stem = stem
        self.counts: list[int] = []
        # A fixed time makes equal data give equal files, so that hashes can be compared.
        self.file = webdataset.TarWriter(str(self.path), encoder=False, mtime=0, mode=0o644)

    def write(self, samples: int, members: dict[str, bytes]) -> None:
        self.file.write({"__key__": f"{self.stem}-{len(self.counts):06d}"} | members)
        self.counts.append(samples)

    def close(self) -> Shard:
        self.file.close()
        found = zip(self.counts, tar_records(self.path), strict=True)
        records = tuple(Record(n, members) for n, (_, members) in found)
        return Shard(self.path.name, sum(self.counts), self.path.stat().st_size, digest(self.path), records)


def _integers(what: str, values: Any, n: int, below: int | None) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise ValueError(f"{what} have shape {array.shape} and type {array.dtype}; expected integers of shape ({n},).")
    if n and (array.min() < 0 or (below is not None and array.max() >= below)):
        limit = "0 or more" if below is None else f"0 .. {below - 1}"
        raise ValueError(f"{what} range over {array.min()} .. {array.max()}; expected {limit}.")
    return array.astype(np.int64)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
