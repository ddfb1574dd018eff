"""Shards that are not local are copied, checked and then read like local ones."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from toy_shards import sample_codes, write_classes

from flashar_pl.data import locations
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.shards import Manifest, ShardReader, verify


@pytest.fixture
def toy(tmp_path: Path) -> Manifest:
    return write_classes(tmp_path / "to y")


@pytest.fixture
def memory(toy: Manifest):
    """The toy shards on fsspec's in-memory file system."""
    store = fsspec.filesystem("memory")
    store.put(toy.root, "/bucket/toy", recursive=True)
    yield "memory://bucket/toy"
    store.rm("/bucket", recursive=True)


def check(location: str, cache: Path, toy: Manifest) -> None:
    manifest = Manifest.load(location)
    assert manifest.splits == toy.splits
    reader = ShardReader(manifest, "train", str(cache))
    np.testing.assert_array_equal(reader.read(np.array([106, 3])).codes, sample_codes(np.array([106, 3]))[:, 0])
    assert sorted(p.stem for p in cache.glob("*.tar")) == sorted(toy.shards("train")[i].sha256 for i in (0, 3)), (
        "only the shards that were needed"
    )
    verify(location, cache=str(cache))


def test_url(toy: Manifest, memory: str, tmp_path: Path) -> None:
    check(memory, tmp_path / "cache", toy)
    assert Manifest.load(memory + "/manifest.json").root == memory


def test_pipe(toy: Manifest, tmp_path: Path) -> None:
    check(f"pipe:cat '{toy.root}'/{{path}}", tmp_path / "cache", toy)


def test_datamodule_reads_remote_shards_from_the_cache(toy: Manifest, memory: str, tmp_path: Path) -> None:
    local = CodesDataModule(toy.root, batch_size=12)
    data = CodesDataModule(memory, batch_size=12, cache=str(tmp_path / "cache"))
    data.setup("fit")
    for a, b in zip(data.train_dataloader(), local.train_dataloader(), strict=True):
        assert a.codes.equal(b.codes)
    fsspec.filesystem("memory").rm(f"/bucket/toy/{toy.shards('train')[0].path}")
    assert len(list(data.train_dataloader())) == 8, "a copy is not fetched again"


def test_a_damaged_copy_is_not_kept(toy: Manifest, tmp_path: Path) -> None:
    location = f"pipe:head -c 3000 '{toy.root}'/{{path}}"
    shard = toy.shards("train")[0]
    with pytest.raises(ValueError, match=r"train-000000\.tar from pipe:head .* has the SHA-256"):
        locations.fetch(location, shard.path, shard.sha256, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_nothing_outside_the_cache_is_touched(toy: Manifest, tmp_path: Path) -> None:
    """Guards a file that a manifest names by its hash, or that a link in the cache leads to."""
    victim, cache, shard = tmp_path / "victim.lock", tmp_path / "cache" / "in", toy.shards("train")[0]
    victim.write_text("kept")
    manifest = Path(toy.root, "manifest.json")
    manifest.write_text(manifest.read_text().replace(shard.sha256, "../../victim"))
    with pytest.raises(ValueError, match="expected a SHA-256"):
        ShardReader(Manifest.load(toy.root), "train", str(cache)).read(np.array([0]))
    cache.mkdir(parents=True)
    (cache / f"{shard.sha256}.lock").symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        locations.fetch(f"pipe:cat '{toy.root}'/{{path}}", shard.path, shard.sha256, cache)
    assert victim.read_text() == "kept"
    assert not list(cache.glob("*.tar"))


def test_readers_of_one_machine_fetch_a_shard_once(toy: Manifest, tmp_path: Path) -> None:
    log = tmp_path / "log"
    location = f"pipe:echo x >> '{log}'; sleep 0.1; cat '{toy.root}'/{{path}}"
    shard = toy.shards("train")[0]

    def get(_: int) -> Path:
        return locations.fetch(location, shard.path, shard.sha256, tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        [path] = set(pool.map(get, range(4)))
    assert path.stat().st_size == shard.bytes
    assert log.read_text() == "x\n"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("memory://nothing/here", r"Cannot read memory://nothing/here/manifest\.json: FileNotFoundError"),
        ("nosuch://x", "Cannot read nosuch://x/manifest.json: ValueError: Protocol not known"),
        ("pipe:cat /x", "lacks {path}"),
        ("pipe:false {path}", "`false manifest.json` failed with exit code 1"),
    ],
)
def test_bad_locations(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.load(location)


def test_a_shard_gone_from_the_remote(toy: Manifest, memory: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").rm("/bucket/toy/train-000001.tar")
    with pytest.raises(ValueError, match=r"not as the manifest says:\n.*Cannot read .*train-000001"):
        verify(memory, cache=str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
