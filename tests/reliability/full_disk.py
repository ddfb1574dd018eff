"""Commands on disks of every size that is too small: what they say, what they leave, and what comes of a second call.

    python -m tests.reliability.full_disk

A command writes to a file system in memory that has room for so many pages, or for so many names, and one more in the
next try, until the command ends well. It must end with 2 and one line that names a path of this disk, leave nothing
half-made, and, given again on a larger disk, end as it does on a large one. A training run must have waited before,
keep its last checkpoint, and go on by itself where room was made meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from processes import free_port  # noqa: E402
from tiny_images import make_images  # noqa: E402
from training_toys import GRID, LEVELS, OPTIONS, save_classifier, write_digit_like  # noqa: E402

from flashar_pl import files  # noqa: E402
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig  # noqa: E402
from flashar_pl.checkpoints.description import Description  # noqa: E402
from flashar_pl.checkpoints.runs import RunCheckpoint  # noqa: E402
from flashar_pl.checkpoints.weights import save_model  # noqa: E402
from flashar_pl.cli import main as flashar  # noqa: E402
from flashar_pl.models import FlashAR, RasterAR  # noqa: E402
from tests.reliability.kills import last, unlike  # noqa: E402

PAGE, LARGE = 4096, "64m"
GRACE = 5.0
"""Seconds that a rank has to end after another has ended with an error."""
WAITED = "trying again in 0 s"


@dataclass(frozen=True)
class Command:
    """A command line, given in the root of the disk."""

    name: str
    words: tuple[str, ...]
    result: Callable[[Path], Any]
    """What of its end must not depend on the disk."""
    again: bool = False
    """Whether what it leaves is continued by the same words; otherwise it leaves nothing."""
    trains: bool = False
    ranks: int = 1
    """Processes that share the work and the disk."""


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def names_of(root: Path) -> list[str]:
    """Every file's name: where the content has times."""
    return sorted(bytes_of(root))


def commands(root: Path) -> list[Command]:
    """The commands and their inputs, which stand on another disk."""
    shards, note = write_digit_like(root / "shards"), {"kind": "pixels", "levels": LEVELS}
    classifier, photos = save_classifier(root / "classifier"), make_images(root / "photos", each=4)
    for name, build in (("raster", RasterAR), ("flashar", lambda backbone: FlashAR(backbone, 1))):
        torch.manual_seed(1)
        model = build(LlamaGen(LlamaGenConfig(**OPTIONS)))
        save_model(root / name, model, Description(model.config(), grid=GRID, tokenizer=note))
    save = {"filename": "last", "every_n_train_steps": 1, "enable_version_counter": False}
    run = {
        "seed_everything": 1,
        "trainer": {
            **{"default_root_dir": "run", "max_steps": 3, "accelerator": "cpu", "log_every_n_steps": 1},
            **{"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1},
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}],
        },
        "model": {"backbone": {"options": OPTIONS}, "flashar": {"branch_layer": 1}, "validation": {"grid_images": 2}},
        "data": {"shards": shards, "batch_size": 8, "validation_batch_size": 8},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    sharded = {"class_path": "flashar_pl.training.sharded.strategy.ShardedStrategy", "init_args": {"compute": "fp32"}}
    run["trainer"] |= {"devices": 2, "strategy": sharded}
    (root / "sharded.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    model, real = ("--checkpoint", str(root / "flashar")), ("--classifier", classifier, "--samples", "3")
    drawn = (
        "--reference",
        shards,
        "--features",
        classifier,
        "--num-samples",
        "6",
        "--min-samples",
        "6",
        "--batch-size",
        "2",
    )
    pictures = ("--tokenizer", "pixels:8", "--image-size", "4", "--workers", "0")
    both = ("--raster", str(root / "raster"), "--flashar", str(root / "flashar"), "--timed-images", "1")
    return [
        Command("fit", ("fit", "--config", str(root / "run.yaml")), lambda disk: last(disk / "run"), True, True),
        Command(
            "fit, sharded over two ranks",
            ("fit", "--config", str(root / "sharded.yaml")),
            lambda disk: last(disk / "run"),
            again=True,
            trains=True,
            ranks=2,
        ),
        Command("tokenize", ("tokenize", "images", str(photos), "--out", "out", *pictures), bytes_of, True),
        Command("convert", ("convert", *model[1:], "--out", "out"), bytes_of),
        Command("evaluate", ("evaluate", *model, *drawn, "--out", "out"), names_of, True),
        Command("report", ("report", *both, *real, "--data", shards, "--out", "out"), names_of),
        Command("score", ("score", *model, "--data", shards, "--out", "out.json"), names_of),
    ]


def mount(disk: Path, *options: str) -> None:
    """PermissionError where this user may not."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "full", str(disk)], capture_output=True)
    if done.returncode:
        raise PermissionError(done.stderr.decode())


@contextmanager
def disk_of(root: Path, room: str) -> Iterator[Path]:
    """A disk of so much room: size=BYTES or nr_inodes=NAMES, of which a page and three names are taken."""
    disk = Path(tempfile.mkdtemp(dir=root))
    mount(disk, f"size={LARGE}", room) if room.startswith("nr") else mount(disk, room)
    try:
        (disk / "ballast").write_bytes(bytes(PAGE))  # a disk has a page at least
        (disk / "here").mkdir()
        yield disk / "here"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


def grow(disk: Path) -> None:
    """Make room."""
    mount(disk.parent, "remount", f"size={LARGE}", "nr_inodes=0")


def call(
    command: Command, disk: Path, said: Path, wait: Callable[[float], None] = lambda seconds: None
) -> list[int]:  # fmt: skip
    """Exit codes of a command's ranks, in processes of their own. The first one writes what it says to `said`, another
    one beside it. One that outlives another's error for so long is killed, as torchrun does: -9."""
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "NODE_RANK": "0", "WORLD_SIZE": str(command.ranks)}
    started = []
    for rank in range(command.ranks):
        if pid := os.fork():
            started.append(pid)
            continue
        code = 99
        try:
            out = os.open(said_by(rank, said), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(disk)
            os.environ.update(job | {"LOCAL_RANK": str(rank)} if command.ranks > 1 else {})
            files.WAITS, files.time.sleep = (0,), wait
            code = flashar(list(command.words))
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    codes, until = dict.fromkeys(started, 0), float("inf")
    while started:
        for pid in list(started):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                started.remove(pid)
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            until = min(until, time.monotonic() + GRACE)
        if time.monotonic() > until:
            for pid in started:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return list(codes.values())


def said_by(rank: int, said: Path) -> Path:
    """Where a rank writes what it says."""
    return said.with_suffix(f".{rank}") if rank else said


def faults(command: Command, disk: Path, codes: list[int], said: str) -> list[str]:
    """What is wrong after a command on a disk that was too small: of all ranks codes, of the first one what it said."""
    found = [f"ranks ended with {codes}"] if 0 in codes else []
    lines = [line for line in said.splitlines() if line.startswith("flashar: error:")]
    named = (
        re.match(r"flashar: error: (.+): (No space left on device|Disk quota exceeded)\.?", lines[0]) if lines else None
    )
    if codes[0] != 2 or "Traceback" in said or len(lines) != 1:
        found.append(f"ended with {codes[0]}")
    if named is None or not (disk / named[1]).resolve().is_relative_to(disk.resolve()):
        found.append("no path of the disk in the line")
    left = [str(path.relative_to(disk)) for path in disk.rglob("*")]
    if half := [path for path in left if ".part" in path or not command.again]:
        found.append(f"left {half[:4]}")
    for path in disk.glob("run/checkpoints/*.ckpt"):
        stored = RunCheckpoint(path)
        stored.tensors({name: name for name in stored.names()})
    return found


def attempt(command: Command, root: Path, room: str, whole: Any, freed: bool = False) -> tuple[str, list[str]]:
    """(`well` where the room was enough, `freed` where it was made in time, `full`; what is wrong)."""
    said = root / "said.txt"
    with disk_of(root, room) as disk:
        codes = call(command, disk, said, (lambda _: grow(disk)) if freed else (lambda _: None))
        text = said.read_text(encoding="utf-8", errors="replace")
        if not any(codes):
            found = unlike(whole, command.result(disk))
            return "freed" if WAITED in text else "well", found
        found = faults(command, disk, codes, text)
        grow(disk)
        if command.again or not found:
            again = call(command, disk, said)
            found += (
                unlike(whole, command.result(disk)) if not any(again) else [f"again: {again}", said.read_text()[-800:]]
            )
        return "full", [*found, text[-1500:]] if found else []


def count(command: Command, root: Path, most: int) -> dict[str, Any]:
    """At most about so many sizes, and every number of names, for a command."""
    with disk_of(root, f"size={LARGE}") as disk:
        assert not any(call(command, disk, root / "said.txt")), (root / "said.txt").read_text()
        whole, used = command.result(disk), os.statvfs(disk)
        pages, names = used.f_blocks - used.f_bfree, used.f_files - used.f_ffree
    total, wrong = Counter[str](), []
    rooms = [f"size={PAGE * (1 + each)}" for each in range(0, 9 * pages, max(1, 2 * pages // most))]
    rooms += [f"nr_inodes={each}" for each in range(3, 9 * names, max(1, 2 * names // most))]
    for freed in (False, True) if command.trains else (False,):
        for kind in ("size", "nr_inodes"):
            for room in (each for each in rooms if each.startswith(kind)):
                end, found = attempt(command, root, room, whole, freed)
                total[end] += 1
                if found:
                    wrong.append({"room": room, "freed": freed, "end": end, "what": found})
                if end == "well":
                    break
    return {"tried": total.total(), **total, "wrong": len(wrong), "examples": wrong[:5]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1000, help="sizes of a disk for each command, evenly spread")
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "full_disk.json")
    asked, counts = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            if asked.only is None or command.name in asked.only:
                counts[command.name] = count(command, Path(folder), asked.most)
                print(command.name, json.dumps(counts[command.name], indent=1), flush=True)
    asked.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(any(each["wrong"] for each in counts.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
