"""Checking shards against their manifest."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashar_pl.data.first_use import check_hash
from flashar_pl.data.manifest import Manifest, Shard
from flashar_pl.data.reader import check_codes, cut_members, map_shard, read_record
from flashar_pl.data.tars import tar_records

SHOWN = 20
"""Problems listed in an error."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found to be in order."""

    samples: dict[str, int]
    """Samples of each split."""
    shards: int
    bytes: int
    labels: dict[str, list[int]]
    """Samples of each class in each split; empty unless class-conditional."""


def verify(location: str | os.PathLike[str], cache: str | None = None) -> Verification:
    """Check every byte of a set of shards: sizes, hashes, the members of each tar, shapes and types, code range,
    label range, ids unique within a split.

    location and cache are those of `Manifest.load` and `ShardReader`.

    Raises:
        ValueError: no manifest, or a list of everything that is wrong.
    """
    manifest = Manifest.load(location)
    problems: list[str] = []
    labels: dict[str, list[int]] = {}
    for split, shards in manifest.splits.items():
        ids, counts = [], np.zeros(manifest.condition.num_classes or 0, dtype=np.int64)
        for shard in shards:
            try:
                path = manifest.local_path(shard, cache)
                ids += _check_contents(manifest, shard, path, counts)
            except ValueError as error:
                problems.append(str(error))
        if ids and len(np.unique(np.concatenate(ids))) < sum(map(len, ids)):
            problems.append(f"The {split} split holds a sample id more than once.")
        if len(counts):
            labels[split] = counts.tolist()
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  {p}" for p in problems[:SHOWN])
        raise ValueError(f"The shards at {manifest.root} are not as the manifest says:{listed}{more}")
    every = [shard for shards in manifest.splits.values() for shard in shards]
    samples = {split: manifest.samples(split) for split in manifest.splits}
    return Verification(samples, len(every), sum(shard.bytes for shard in every), labels)


def _check_contents(manifest: Manifest, shard: Shard, path: str, counts: np.ndarray) -> list[np.ndarray]:
    """The ids of the shard's records; adds its labels to `counts`. Raises ValueError at the first problem."""
    data = map_shard(path, shard.bytes)
    check_hash(manifest, shard, path)
    inside = Counter(place for _, members in tar_records(Path(path)) for place in members.values())
    listed = Counter((offset, size) for record in shard.records for offset, size in record.members.values())
    if inside != listed:
        raise ValueError(f"The members of the tar {path} are not those the manifest lists.")
    ids = []
    for record in shard.records:
        members = read_record(manifest, cut_members(data, record), path, record.samples)
        check_codes(members["codes.npy"], manifest, path)
        if len(counts):
            counts += np.bincount(members["labels.npy"], minlength=len(counts))
        ids.append(np.array(members["ids.npy"]))
    return ids
