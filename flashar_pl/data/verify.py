"""Checking shards against their manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from flashar_pl.data.first_use import check_hash
from flashar_pl.data.manifest import Manifest, Shard
from flashar_pl.data.reader import ShardReader, check_codes, cut_members, map_shard, read_record
from flashar_pl.data.tars import tar_records

SHOWN = 20
"""Problems listed in an error."""
COMPARED = 16
"""Samples of two splits that are compared at once."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found to be in order."""

    samples: dict[str, int]
    """Samples of each split."""
    shards: int
    bytes: int
    labels: dict[str, list[int]]
    """Samples of each class in each split; empty unless class-conditional."""
    shared: dict[str, dict[str, int]]
    """Split -> other split -> how many of its samples have the codes of one there, if any."""


def verify(location: str | os.PathLike[str], cache: str | None = None) -> Verification:
    """Check every byte of a set of shards: sizes, hashes, the members of each tar, shapes and types, code range,
    label range, ids unique within a split. Samples that two splits have are counted, whatever their ids; no split may
    lie wholly in another one.

    location and cache are those of `Manifest.load` and `ShardReader`.

    Raises:
        ValueError: no manifest, or a list of everything that is wrong.
    """
    manifest = Manifest.load(location)
    problems: list[str] = []
    labels: dict[str, list[int]] = {}
    digests: dict[str, np.ndarray] = {}
    for split, shards in manifest.splits.items():
        ids, contents, counts = [], [], np.zeros(manifest.condition.num_classes or 0, dtype=np.int64)
        for shard in shards:
            try:
                path = manifest.local_path(shard, cache)
                for record in _check_contents(manifest, shard, path, counts):
                    ids.append(np.array(record["ids.npy"]))
                    contents.append(_digests(record["codes.npy"]))
            except ValueError as error:
                problems.append(str(error))
        if ids and len(np.unique(np.concatenate(ids))) < sum(map(len, ids)):
            problems.append(f"The {split} split holds a sample id more than once.")
        if len(counts):
            labels[split] = counts.tolist()
        digests[split] = np.concatenate(contents or [np.zeros(0, np.uint64)])
    samples, shared = {split: manifest.samples(split) for split in manifest.splits}, _shared(digests)
    problems += [
        f"Every sample of the {split} split is in the {other} split, too: they are not held out."
        for split, others in shared.items()
        for other, number in others.items()
        if number == samples[split]
    ]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  {p}" for p in problems[:SHOWN])
        raise ValueError(f"The shards at {manifest.root} are not as the manifest says:{listed}{more}")
    every = [shard for shards in manifest.splits.values() for shard in shards]
    return Verification(samples, len(every), sum(shard.bytes for shard in every), labels, shared)


def _check_contents(manifest: Manifest, shard: Shard, path: str, counts: np.ndarray) -> Iterator[dict[str, Any]]:
    """The shard's records; adds its labels to `counts`. Raises ValueError at the first problem."""
    data = map_shard(path, shard.bytes)
    check_hash(manifest, shard, path)
    inside = Counter(place for _, members in tar_records(Path(path)) for place in members.values())
    listed = Counter((offset, size) for record in shard.records for offset, size in record.members.values())
    if inside != listed:
        raise ValueError(f"The members of the tar {path} are not those the manifest lists.")
    for record in shard.records:
        members = read_record(manifest, cut_members(data, record), path, record.samples)
        check_codes(members["codes.npy"], manifest, path)
        if len(counts):
            counts += np.bincount(members["labels.npy"], minlength=len(counts))
        yield members


def check_held_out(manifest: Manifest, cache: str | None = None) -> None:
    """ValueError where the validation split is the beginning of the training split, or the other way round.

    It reads until the first difference: a few samples. All the others that both splits have are counted by `verify`.
    """
    readers = [ShardReader(manifest, split, cache, verify=False) for split in ("train", "validation")]
    n = min(map(len, readers))
    for begin in range(0, n, COMPARED):
        rows = np.arange(begin, min(begin + COMPARED, n))
        first, second = (reader.read(rows) for reader in readers)
        same = all(np.array_equal(getattr(first, each), getattr(second, each)) for each in ("codes", "labels", "texts"))
        if not same:
            return
    raise ValueError(
        f"The shards at {manifest.root} have the same {n:,} samples in their train and validation splits: nothing is "
        "held out. Tokenize other images as the validation split."
    )


def _digests(codes: np.ndarray) -> np.ndarray:
    """64 bits of all the codes of each sample: (n, K, H, W) -> (n,) uint64."""
    return np.frombuffer(b"".join(blake2b(row, digest_size=8).digest() for row in codes.copy()), dtype=np.uint64)


def _shared(digests: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Split -> other split -> how many of its samples are there too, where there are any."""
    counts = {
        split: {other: int(np.isin(own, digests[other]).sum()) for other in digests if other != split}
        for split, own in digests.items()
    }
    return {split: {other: n for other, n in others.items() if n} for split, others in counts.items()}
