"""A damaged checkpoint is never used: file, place and the newest whole one are named."""

import errno
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from flashar_pl import files
from flashar_pl.checkpoints import sharded as sharded_files
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.checkpoints.sharded import SafeReader, read_sharded, write_sharded
from flashar_pl.checkpoints.verify import verify
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.cli import main
from flashar_pl.integrity import SWITCH, Damaged, tensor_crcs
from flashar_pl.tensor_files import copied, known_sums, page_sums, read_torch
from tests import tiny

TENSORS = {"net.a": torch.arange(3000.0).view(30, 100), "net.b": torch.ones(5)}


@pytest.fixture
def torch_file(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": TENSORS, "global_step": 7}, path)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = tiny.flashar()
    save_model(tmp_path / "model", model, Description(model.config()))
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded.ckpt"
    write_sharded(path, dict(TENSORS), {"global_step": 7}, True)
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_no_flipped_bit_of_a_torch_file_is_used(torch_file: Path) -> None:
    whole, found = torch_file.read_bytes(), 0
    for seed in range(100):
        torch_file.write_bytes(whole)
        flip(torch_file, random.Random(seed).randrange(8 * len(whole)))
        try:
            content = read_torch(torch_file)
        except ValueError as error:
            assert str(torch_file) in str(error)  # noqa: PT017
            found += 1
        else:  # a byte between records, which nothing reads
            assert same(content["state_dict"], TENSORS)
            assert content["global_step"] == 7
    assert found > 50


def test_no_flipped_bit_of_a_converted_model_is_used(directory: Path, capsys) -> None:
    path = directory / "model.safetensors"
    expected, whole, found = load_model(directory).model.state_dict(), path.read_bytes(), 0
    for seed in range(40):
        flip(path, random.Random(seed).randrange(8 * len(whole)))
        try:
            assert same(load_model(directory).model.state_dict(), expected)  # a bit that nothing depends on
        except ValueError as error:
            found += "model" in str(error)
        path.write_bytes(whole)
    assert found == 40
    config = directory / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    load_model(directory)
    assert "config.json is not what was written with model.safetensors: edited, or damaged." in capsys.readouterr().err
    flip(path, 8 * len(whole) - 30)
    with pytest.raises(Damaged, match=r"model\.safetensors is damaged: .*weight is not what was written"):
        load_model(directory)


@pytest.mark.parametrize("name", ["__0_0.distcp", "meta.pt", ".metadata"])
def test_no_flipped_bit_of_a_sharded_checkpoint_is_used(sharded: Path, name: str) -> None:
    names = {key: key for key in TENSORS}
    assert same(read_sharded(sharded, names), TENSORS)
    path = sharded / name
    whole = path.read_bytes()
    for seed in range(20):
        flip(path, random.Random(seed).randrange(8 * len(whole)))
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            read_sharded(sharded, names)
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing|no file .*{name}"):
        read_sharded(sharded, names)


def test_shards_without_a_list_end_in_one_line(sharded: Path) -> None:
    (sharded / "digests.json").unlink()
    names = {key: key for key in TENSORS}
    assert same(read_sharded(sharded, names), TENSORS)  # as older versions wrote them
    shard = sharded / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="fewer than it says") as error:
        read_sharded(sharded, names)
    assert "\n" not in str(error.value)


@pytest.fixture(params=[True, False], ids=["sums", "crc32 only"])
def run_file(tmp_path: Path, request) -> Path:
    """What a fit with averages leaves: weights, averages and moments."""
    model, path = tiny.flashar(), tmp_path / "run.ckpt"
    state = model.state_dict()
    averages, moments = ({name: value + n for name, value in state.items()} for n in (1, 2))
    weights = {f"net.{name}": value for name, value in state.items()} | {f"ema.{n}": v for n, v in averages.items()}
    about = Description(model.config()).to_dict()
    sums = {"sums": page_sums(weights.values())} if request.param else {}  # others are of Lightning's own writer
    torch.save({"state_dict": weights, "optimizer_states": [moments], "flashar": about, **sums}, path)
    return path


def test_loading_compares_what_it_uses(run_file: Path, monkeypatch) -> None:
    """Comparing moments and averages too took longer than loading the weights."""
    whole, checked, crc32 = run_file.read_bytes(), [], zlib.crc32
    stored = {name: value.clone() for name, value in RunCheckpoint(run_file).content["state_dict"].items()}
    with monkeypatch.context() as patched:
        patched.setattr(zlib, "crc32", lambda data, *crc: (checked.append(len(data)), crc32(data, *crc))[1])
        raw = load_model(run_file, "raw").model.state_dict()
    assert same({f"net.{name}": value for name, value in raw.items()}, {n: stored[n] for n in stored if n[0] == "n"})
    assert sum(checked) < len(whole) / 2
    for used, other, name in (("raw", "ema", "net.backbone"), ("ema", "raw", "ema.backbone")):
        tensor = next(value for each, value in stored.items() if each.startswith(name) and value.numel() > 100)
        flip(run_file, 8 * whole.index(tensor.numpy().tobytes()) + 100)
        load_model(run_file, other)
        with pytest.raises(Damaged, match=rf"run\.ckpt is damaged: {name[4:]}.* is not what was written"):
            load_model(run_file, used)
        with pytest.raises(Damaged):
            RunCheckpoint(run_file).check_whole()  # before a run continues from it
        run_file.write_bytes(whole)


def test_sums_of_pages_find_what_disks_do(tmp_path: Path) -> None:
    """A bit, a page that is lost, two that are exchanged, and the bytes behind the last page; and nothing else."""
    file, n = tmp_path / "a.pt", 3 * 2**18 + 4096 + 7  # more than one piece, some pages, a rest
    stored = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save({"a": stored, "sums": page_sums([stored])}, file)

    def read(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
        content = read_torch(file)
        change(content["a"])
        return copied(file, {"a": content["a"]}, set(), known_sums(content))

    def exchange(a: torch.Tensor) -> None:
        a[4096:8192], a[8192:12288] = a[8192:12288].clone(), a[4096:8192].clone()

    assert same(read(lambda a: None), {"a": stored})
    for change in (
        exchange,
        lambda a: a[-1].bitwise_xor_(1),
        lambda a: a[2**18].bitwise_xor_(128),
        lambda a: a[:4096].zero_(),
    ):
        with pytest.raises(Damaged, match=r"a\.pt is damaged: a is not"):
            read(change)
    for odd in (3, [3], [[1, "a"]], [[1, 2, 3]]):
        assert not known_sums({"sums": odd})


def test_weights_that_share_memory_share_it_when_loaded(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    content = {"a": both[:3], "b": both.view(2, 3).T, "none": torch.empty(0, 2)}
    torch.save(content, tmp_path / "a.pt")
    crcs = tensor_crcs(tmp_path / "a.pt")
    found = copied(tmp_path / "a.pt", read_torch(tmp_path / "a.pt", mmap=True, whole=False), crcs)
    assert same(found, content)
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="holds a str as a; expected a tensor"):
        copied(tmp_path / "a.pt", {"a": "b"}, crcs)


def test_a_damaged_checkpoint_names_the_newest_whole_one(torch_file: Path, capsys) -> None:
    older = torch_file.with_name("step=5.ckpt")
    older.write_bytes(torch_file.read_bytes())
    torch_file.with_name("step=6.ckpt").write_bytes(b"PK nothing")
    assert main(["checkpoint", "verify", str(older), str(torch_file)]) == 0
    assert "last.ckpt: whole; every tensor has its CRC-32." in capsys.readouterr().out
    data = torch_file.read_bytes()
    flip(torch_file, 8 * data.index(TENSORS["net.a"].numpy().tobytes()) + 20)
    assert main(["checkpoint", "verify", str(torch_file)]) == 2
    said = capsys.readouterr().err
    assert "last.ckpt is damaged: " in said
    assert f"{older} is whole among the checkpoints beside it." in said


def test_the_comparison_can_be_switched_off(directory: Path, monkeypatch) -> None:
    weights = directory / "model.safetensors"
    flip(weights, 8 * weights.stat().st_size - 30)
    monkeypatch.setenv(SWITCH, "1")
    load_model(directory)
    with pytest.raises(Damaged):
        verify(directory)


def test_files_saved_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "other.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("other.pt", "old.pt"):
        assert same(read_torch(tmp_path / name), TENSORS)
        assert "without checksums" in verify(tmp_path / name)


@pytest.mark.parametrize(
    "index", [b"\x80\x04r\xff\xff\xff\x7f", b"\x80\x04Nr\xff\xff\xff\x0f.", b"\x80\x04\x8e" + b"\xff" * 8]
)
def test_an_index_cannot_ask_for_memory(tmp_path: Path, index: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(index)
    with pytest.raises(ValueError, match="not the index of a sharded checkpoint"):
        SafeReader(tmp_path).names()


@pytest.mark.parametrize("place", ["/etc/hostname", "../secret", "sub/x"])
def test_an_index_names_files_of_its_directory_only(sharded: Path, place: str) -> None:
    import pickle

    (sharded / "digests.json").unlink()
    path = sharded / ".metadata"
    index = pickle.loads(path.read_bytes())
    for each in index.storage_data.values():
        each.relative_path = place
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="no file of this directory"):
        read_sharded(sharded, {key: key for key in TENSORS})


def test_a_torch_file_cannot_ask_for_memory(tmp_path: Path) -> None:
    class Announced:
        def __reduce__(self):
            return bytearray, (10**12,)

    torch.save({"a": Announced()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="asks for memory"):
        read_torch(tmp_path / "a.pt")
    torch.save({"a": torch.ones(1).expand(10**9)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="fewer values in the file"):
        read_torch(tmp_path / "b.pt")


@pytest.mark.parametrize("swap", [True, False])
def test_a_sharded_checkpoint_is_never_absent(sharded: Path, monkeypatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    seen = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (rename(self, to), seen.append(sharded.exists()))[0])
    changed = {key: value + 1 for key, value in TENSORS.items()}
    write_sharded(sharded, dict(changed), {"global_step": 8}, True)
    assert same(read_sharded(sharded, {key: key for key in TENSORS}), changed)
    assert all(seen) or not swap
    assert [each.name for each in sharded.parent.iterdir()] == [sharded.name]


def test_a_sharded_checkpoint_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch) -> None:
    """meta.pt was only in the machine's memory when the checkpoint before was removed: lost power took both."""
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))
    write_sharded(tmp_path / "a.ckpt", dict(TENSORS), {"global_step": 7}, True)
    assert [each.name for each in (tmp_path / "a.ckpt").iterdir() if each.stat().st_ino not in synced] == []


def test_a_stop_within_a_write_stays_a_stop(sharded: Path, monkeypatch) -> None:
    """torch wraps it in an error of its writer, and the command ended with code 1: "cannot be written"."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded_files.dcp.FileSystemWriter, "write_data", stop)
    with pytest.raises(KeyboardInterrupt):
        write_sharded(sharded, dict(TENSORS), {"global_step": 8}, True)
    assert [each.name for each in sharded.parent.iterdir()] == [sharded.name]


def test_a_full_disk_keeps_the_old_checkpoint_and_is_tried_again(torch_file: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(files, "WAITS", [0])
    before, tries = torch_file.read_bytes(), []

    def write() -> None:
        tries.append(1)
        with files.replacing(torch_file) as part:
            part.write_bytes(b"half")
            if len(tries) < 3:
                torch.save(TENSORS, "/dev/full")

    with pytest.raises(OSError, match=rf"No space left on device: '{torch_file}'"):
        files.patiently(write)
    assert torch_file.read_bytes() == before
    assert [each.name for each in torch_file.parent.iterdir()] == ["last.ckpt"]
    assert "trying again" in capsys.readouterr().err
    files.patiently(write)
    assert torch_file.read_bytes() == b"half"


FULL = OSError(errno.ENOSPC, "No space left on device")
UNEXPECTED = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("who", ["its writer", "its list", "another process"])
def test_a_full_disk_of_one_process_is_waited_for_by_all(sharded: Path, capsys, monkeypatch, who: str) -> None:
    """torch wraps the error of a process in one without a code, which ended the run; where the list of digests had no
    room, the first process began anew alone, and met the others in another place."""
    monkeypatch.setattr(files, "WAITS", [0, 0])
    failures: list[Exception] = [UNEXPECTED, FULL]
    if who == "another process":
        failures = [OSError(errno.ENOSPC, "No space left on device", str(sharded))] * 2  # as it names it
    if who == "its writer":
        failures = [CheckpointException("", {1: (failure, None)}) for failure in failures]
    there: dict[str, Any] = {"its writer": sharded_files.dcp, "its list": sharded_files}
    name = {"its writer": "save", "its list": "write_list"}.get(who)
    meetings: list[Any] = []

    def meet(own: Any, group: object) -> list[Any]:
        meetings.append(own[0])
        return [own, (failures.pop() if len(meetings) in (2, 4) and name is None else None, {})]

    monkeypatch.setattr(sharded_files, "gather", meet)
    if name is not None:
        real = getattr(there[who], name)

        def full(*args: Any, **options: Any) -> None:
            if failures:
                raise failures.pop()
            real(*args, **options)

        monkeypatch.setattr(there[who], name, full)
    changed = {key: value + 1 for key, value in TENSORS.items()}
    files.patiently(lambda: write_sharded(sharded, dict(changed), {"global_step": 8}, True))
    assert f"No space left on device: '{sharded}'; trying again in 0 s." in capsys.readouterr().err
    assert same(read_sharded(sharded, {key: key for key in TENSORS}), changed)
    assert [each.name for each in sharded.parent.iterdir()] == [sharded.name]
    assert len(meetings) == {"its writer": 2 + 2 + 3, "its list": 3 + 3 + 3, "another process": 2 + 2 + 3}[who]
