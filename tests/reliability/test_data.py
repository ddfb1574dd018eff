"""Manifests and the records of shards answer every damaged copy with samples or one line."""

import errno
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.order import TrainingOrder
from flashar_pl.data.reader import check_codes, cut_members, gather, read_record
from flashar_pl.data.shards import ShardReader, ShardWriter
from tests.reliability.mutate import Target, short

CONDITIONS: dict[str, tuple[ConditionSpec, dict[str, Any]]] = {
    "class": (ConditionSpec("class", num_classes=5), {"labels": [0, 4, 2]}),
    "text": (ConditionSpec("text"), {"texts": ["a cup", "une tasse n\u00b0 1", ""]}),
    "features": (
        ConditionSpec("text-features", length=3, width=2),
        {"features": [np.full((n, 2), n, np.float32) for n in (1, 3, 2)]},
    ),
}


ODD = (0, -1, 1, 2, 7, 1 << 31, 10**30, 0.5, -0.0, True, None, "", "x", "../x", "a\0", [], {}, [[]], [0, 1 << 40])
"""What a field is replaced by."""
FOLDER = tempfile.TemporaryDirectory(prefix="damaged-")


@cache
def shards(kind: str) -> tuple[Manifest, bytes, bytes]:
    """A small data set: its manifest, the manifest's file, and its one tar."""
    condition, columns = CONDITIONS[kind]
    facts = {"name": "toy", "tokenizer": {"kind": "none"}, "grid": (2, 3), "vocabulary": 300, "crops": 2}
    root = Path(FOLDER.name, kind)
    with ShardWriter(root, condition=condition, **facts) as writer:
        writer.write("train", np.arange(36).reshape(3, 2, 2, 3), ids=range(3), **columns)
    return Manifest.load(root), (root / "manifest.json").read_bytes(), (root / "train-000000.tar").read_bytes()


def read_manifest(data: bytes) -> None:
    """What was read can be planned with, and written again."""
    manifest = Manifest.parse(data, "toy", "manifest.json")
    for split in manifest.splits:
        if manifest.samples(split):
            TrainingOrder(manifest.block_sizes(split), 1, 0, 4).batch(0, 0)
            manifest.fingerprint(split)
    assert Manifest.parse(json.dumps(manifest.stored(Path("toy"))).encode(), "toy", "manifest.json") == manifest


def read_with_odd_fields(kind: str) -> Callable[[bytes], None]:
    """A good tar read by a manifest with some fields replaced; the bytes say which, and by what."""

    def read(data: bytes) -> None:
        chance, stored = random.Random(data), json.loads(shards(kind)[1])
        for _ in range(chance.choice((1, 1, 2, 4))):
            held = stored
            while True:
                key = chance.choice(list(held) if isinstance(held, dict) else range(len(held)))
                if not isinstance(held[key], dict | list) or not held[key] or chance.random() < 0.1:
                    break
                held = held[key]
            number = type(held[key]) is int and chance.random() < 0.5
            held[key] = held[key] + chance.choice((-1, 1, 64)) if number else chance.choice(ODD)
        manifest = Manifest.parse(json.dumps(stored).encode(), shards(kind)[0].root, "manifest.json")
        for split in manifest.splits:
            reader = ShardReader(manifest, split, verify=False)
            reader.read(np.arange(len(reader)), np.full(len(reader), manifest.crops - 1))

    return read


def read_samples(kind: str) -> Callable[[bytes], None]:
    """A reader of a damaged tar by the offsets of the good manifest, and without them, as a stream is read."""

    def read(data: bytes) -> None:
        manifest = shards(kind)[0]
        [record] = manifest.shards("train")[0].records
        for samples in (record.samples, None):
            members = read_record(manifest, cut_members(data, record), "toy.tar", samples)
            check_codes(members["codes.npy"], manifest, "toy.tar")
            gather(manifest, [(members, row, 1) for row in range(len(members["ids.npy"]))])

    return read


TARGETS = [
    Target(
        "manifest",
        read_manifest,
        [shards(kind)[1].replace(b'"none"', b'"none", "weights": "vq.pt"') for kind in CONDITIONS],
    ),
    *(Target(f"fields, {kind}", read_with_odd_fields(kind), [random.Random(0).randbytes(4096)]) for kind in CONDITIONS),
    *(Target(f"shard, {kind}", read_samples(kind), [shards(kind)[2]]) for kind in CONDITIONS),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target: Target) -> None:
    short(target)


def test_every_flipped_bit_is_found_before_a_sample_is_given() -> None:
    """In headers, padding, codes, labels and ids alike."""
    manifest, _, tar = shards("class")
    shard = replace(manifest.shards("train")[0], path="flipped.tar")
    manifest = replace(manifest, splits={"train": (shard,)})
    chance = random.Random(0)
    for _ in range(30):
        damaged = bytearray(tar)
        damaged[chance.randrange(len(tar))] ^= 1 << chance.randrange(8)
        Path(manifest.root, shard.path).write_bytes(damaged)
        with pytest.raises(ValueError, match="flipped"):
            ShardReader(manifest, "train").read(np.arange(3))


@pytest.mark.parametrize("where", ["_write_record", "close"])
def test_shards_on_a_full_disk_name_their_place_and_leave_nothing(tmp_path: Path, monkeypatch, where: str) -> None:
    """The line had no path, and what failed at the end left a hidden directory."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, where, fail)
    condition, tokenizer = ConditionSpec("class", num_classes=3), {"kind": "pixels", "levels": 8}
    made = {"tokenizer": tokenizer, "grid": (4, 4), "vocabulary": 8, "condition": condition, "block": 4}
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"),
        ShardWriter(tmp_path / "out", name="x", **made) as writer,
    ):
        writer.write("train", np.zeros((8, 4, 4), np.int64), ids=range(8), labels=np.zeros(8, np.int64))
    assert not list(tmp_path.iterdir())
