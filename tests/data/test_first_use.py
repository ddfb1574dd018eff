"""Every shard is compared with its hash once a run, before its first sample is used."""

import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from toy_shards import write_classes

from flashar_pl import ranks
from flashar_pl.backbones.condition import Batch
from flashar_pl.data import first_use
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.first_use import FirstUse
from flashar_pl.data.loader import without_worker
from flashar_pl.data.shards import Manifest, ShardReader


@pytest.fixture
def toy(tmp_path: Path) -> Manifest:
    return write_classes(tmp_path / "toy")


def flip(manifest: Manifest, number: int = 2, split: str = "train") -> None:
    """Flip the lowest bit of the last code of a shard, which stays within the vocabulary."""
    shard = manifest.shards(split)[number]
    path = Path(manifest.root, shard.path)
    data = bytearray(path.read_bytes())
    offset, size = shard.records[-1].members["codes.npy"]
    data[offset + size - 2] ^= 1
    path.write_bytes(data)


def swap(manifest: Manifest) -> None:
    """Exchange two shards of one size."""
    one, two = (Path(manifest.root, manifest.shards("train")[i].path) for i in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    shutil.move(one, f"{one}.old")
    shutil.move(two, one)
    shutil.move(f"{one}.old", two)


FLIPPED = r"train-000002\.tar has the SHA-256 \w{64}, the manifest says \w{64}: it is damaged or was replaced\. Copy"
SWAPPED = r"train-00000(1|2)\.tar has the SHA-256 .*: it is train-00000(1|2)\.tar under another name\. Copy it again"


@pytest.mark.parametrize(("spoil", "message"), [(flip, FLIPPED), (swap, SWAPPED)])
@pytest.mark.parametrize("reading", ["exact", "streamed"])
def test_a_flipped_bit_and_swapped_shards_stop_training(toy: Manifest, spoil, message: str, reading) -> None:
    spoil(toy)
    data = CodesDataModule(toy.root, reading=reading, batch_size=50, seed=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=message):
        list(data.train_dataloader())
    hurried = CodesDataModule(toy.root, reading=reading, batch_size=50, seed=1, verify=False)
    hurried.setup("fit")
    assert len(list(hurried.train_dataloader())) == 2


# torch waits five seconds for a worker that has failed in the middle of its stream
@pytest.mark.parametrize("reading", ["exact", pytest.param("streamed", marks=pytest.mark.slow)])
def test_worker_processes_verify_too(toy: Manifest, reading) -> None:
    flip(toy)
    data = CodesDataModule(toy.root, reading=reading, batch_size=50, num_workers=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"\AThe shard .*" + FLIPPED):
        list(data.train_dataloader())


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_an_error_of_a_worker_is_told_in_one_line(kind: type[Exception]) -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise kind(
            "Caught Error in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            f'  File "x.py", line 3\n{kind.__name__}: a: wrong\n  b\n'
        )

    got = without_worker(batches())
    assert next(got) == 1
    with pytest.raises(kind, match=r"\Aa: wrong\n  b\Z"):
        next(got)


def test_validation_is_verified_where_it_is_read(toy: Manifest) -> None:
    flip(toy, 0, "validation")
    data = CodesDataModule(toy.root, batch_size=50)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 2
    with pytest.raises(ValueError, match=r"validation-000000\.tar has the SHA-256"):
        list(data.val_dataloader())


def test_a_reader_gives_nothing_of_a_damaged_shard(toy: Manifest) -> None:
    flip(toy)
    reader = ShardReader(toy, "train")
    reader.read(np.arange(60))
    with pytest.raises(ValueError, match=FLIPPED):
        reader.read(np.array([60]))
    ShardReader(toy, "train", verify=False).read(np.array([60]))


def test_what_is_found_ahead_stops_the_next_batch(toy: Manifest) -> None:
    flip(toy)
    reader = ShardReader(toy, "train")
    reader.verify_ahead()

    def train() -> None:
        for _ in range(1000):
            reader.read(np.array([0]))
            time.sleep(0.01)

    with pytest.raises(ValueError, match=FLIPPED):
        train()


def test_readers_of_one_machine_hash_a_shard_once(toy: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cost: threads, processes and passes share what is done."""
    hashed: list[str] = []
    digest = first_use.digest

    def slow(path: str) -> str:
        hashed.append(Path(path).name)
        time.sleep(0.02)
        return digest(path)

    monkeypatch.setattr(first_use, "digest", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: FirstUse(toy).check(toy.shards("train")), range(4)))
    in_a_worker = pickle.loads(pickle.dumps(ShardReader(toy, "train")))
    in_a_worker.read(np.arange(107))
    assert sorted(hashed) == [shard.path for shard in toy.shards("train")]


def test_devices_of_one_machine_share_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use._Marks, "path", "own")
    monkeypatch.setattr(ranks, "gather", lambda own: [("elsewhere", "its"), (own[0], "first"), own])
    first_use.share_marks()
    assert first_use._Marks.directory() == "first"


def test_a_shard_that_was_changed_is_hashed_again(toy: Manifest) -> None:
    FirstUse(toy).check(toy.shards("train"))
    flip(toy)
    with pytest.raises(ValueError, match=FLIPPED):
        FirstUse(toy).check(toy.shards("train"))


@pytest.fixture
def streamed(toy: Manifest):
    """Batches of the toy shards streamed from a memory file system, after one of them was changed there."""
    store = fsspec.filesystem("memory")

    def read(change: Callable[[bytes], bytes] = bytes, **options) -> list[Batch]:
        store.put(toy.root, "/streamed/toy", recursive=True)
        store.pipe_file("/streamed/toy/train-000002.tar", change(store.cat_file("/streamed/toy/train-000002.tar")))
        data = CodesDataModule("memory://streamed/toy", reading="streamed", batch_size=50, resampled=False, **options)
        data.setup("fit")
        return list(data.train_dataloader())

    yield read
    store.rm("/streamed", recursive=True)


def test_a_streamed_remote_shard_is_verified_at_its_end(toy: Manifest, streamed) -> None:
    flip(toy)
    assert len(streamed(verify=False)) == 2
    with pytest.raises(ValueError, match=r"memory://streamed/toy/train-000002\.tar has the SHA-256"):
        streamed()


def test_a_streamed_remote_shard_may_not_be_longer_and_warns_where_it_breaks_off(toy: Manifest, streamed) -> None:
    with pytest.raises(ValueError, match=r"train-000002\.tar has the SHA-256"):
        streamed(lambda data: data + bytes(512))
    end = min(offset for offset, _ in toy.shards("train")[2].records[1].members.values()) - 512
    with pytest.warns(UserWarning, match=rf"train-000002\.tar broke off after {end} of \d+ bytes"):
        streamed(lambda data: data[:end])


def test_a_link_is_followed_for_reading_only(toy: Manifest, tmp_path: Path) -> None:
    """As the Hugging Face cache links into its blobs; what a link leads to must have size and hash of the manifest."""
    shard = toy.shards("train")[0]
    path, blob = Path(toy.root, shard.path), tmp_path / "blobs" / shard.sha256
    blob.parent.mkdir()
    shutil.move(path, blob)
    path.symlink_to(blob)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in [*blob.parent.iterdir(), *Path(toy.root).iterdir()])
    assert ShardReader(toy, "train").read(np.array([3])).ids == [3]
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in [*blob.parent.iterdir(), *Path(toy.root).iterdir()])
    for other in (tmp_path, tmp_path / "nothing", Path("/dev/zero")):
        path.unlink()
        path.symlink_to(other)
        with pytest.raises(ValueError, match=r"train-000000\.tar is missing"):
            ShardReader(toy, "train").read(np.array([3]))
