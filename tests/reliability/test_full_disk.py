"""Full disks: the short form of `make reliability-disk`, and what it found."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashar_pl import files
from flashar_pl.training.logger import RunLogger
from flashar_pl.training.run_directory import only_one
from tests.reliability.full_disk import mount


@pytest.mark.slow
def test_commands_on_full_disks(tmp_path: Path) -> None:
    """In a process of its own: it forks. Two ranks take their time: `make reliability-disk` alone runs them."""
    try:
        mount(tmp_path, "size=1m")
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    subprocess.run(["umount", str(tmp_path)], check=True)
    only = ("fit", "tokenize", "convert", "evaluate", "report", "score")
    out = str(tmp_path / "counts.json")
    words = ["-m", "tests.reliability.full_disk", "--most", "1", "--out", out, "--only", *only]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert len(json.loads(Path(out).read_text(encoding="utf-8"))) == len(only)


class Full:
    """TensorBoard's local files, of which each write ends in the middle, so many times."""

    def __init__(self, local, times: int) -> None:
        self.local, self.times = local, times

    def write(self, filename, content, binary_mode) -> None:
        self._write(self.local.write, filename, content)

    def append(self, filename, content, binary_mode) -> None:
        self._write(self.local.append, filename, content)

    def _write(self, how, filename, content) -> None:
        self.times -= 1
        how(filename, content if self.times < 0 else content[:5], True)
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("times", [2, 3])
def test_curves_wait_for_room_and_name_their_file(tmp_path: Path, monkeypatch, capfd, times: int) -> None:
    """TensorBoard's thread died with a traceback, the run with it, and half a record hid what came after."""
    monkeypatch.setattr(files, "WAITS", (0, 0))
    logger = RunLogger(tmp_path, name="", version="")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    local = logger.files.local
    monkeypatch.setattr(logger.files, "local", Full(logger.files.local, times))
    logger.log_metrics({"loss": 2.0}, 2)
    if times == 2:
        logger.finalize("success")
    else:
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/events"):
            logger.finalize("success")
    monkeypatch.setattr(logger.files, "local", local)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "trying again in 0 s" in said
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == ([1, 2] if times == 2 else [1])


@pytest.mark.parametrize("make", [files.replacing, lambda path: files.new_directory(path, "result")])
def test_folders_made_for_nothing_go_again(tmp_path: Path, make) -> None:
    """An evaluation's folder was left empty, and refused at the second call as somebody else's."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space left"), make(tmp_path / "mine" / "a" / "b" / "c"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_lock_without_room_names_its_file(tmp_path: Path, monkeypatch) -> None:
    """Closing it failed anew, without a path."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.lock'"), only_one(tmp_path):
        pass
