"""Damaged files, made from good ones: every reader answers with a value or a ValueError, fast and in little memory.

`short` runs a few hundred mutations in a test; `python -m tests.reliability.mutate ROOM COUNT` the targets of
tests/reliability/test_ROOM.py at length, prints how many inputs were tried and what went wrong, and keeps that in
benchmarks/results/damaged_files.json. Files lie in memory (/dev/shm, where there is one): a disk takes ten times as
long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import random
import resource
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SECONDS = 2.0
"""A reader that computes for longer hangs; one that waits for something never ends."""
TOKENS = (
    *(
        b"\x00",
        b"\xff",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\r",
    ),
    *(
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"9" * 30,
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b"[" * 2000,
        b"../",
        b"\n",
    ),
)
"""What is put into files, besides random bytes: edges of numbers, of texts and of nesting."""


@dataclass(frozen=True)
class Target:
    """A reader, and files that it reads."""

    name: str
    read: Callable[[bytes], object]
    good: Sequence[bytes]
    clean: tuple[type[BaseException], ...] = (ValueError,)
    """What it may raise."""
    memory: int = 64 * 2**20
    """Bytes of memory that it may take beside four times the file."""


@dataclass
class Outcome:
    """What became of the inputs of a target."""

    name: str
    tried: int = 0
    read: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    """Unclean ends, hangs and bombs; each with what repeats it."""
    slowest: float = 0.0
    """CPU-seconds."""
    grown: int = 0
    """Most bytes by which the process grew over what it had before a thousand damaged files."""

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{name: getattr(self, name) for name in ("tried", "read", "refused")},
            **{"unclean": len(self.wrong), "wrong": self.wrong[:5]},
            **{"slowest_ms": round(1000 * self.slowest), "grown_mib": self.grown >> 20},
        }


def mutate(good: Sequence[bytes], seed: int) -> bytes:
    """A damaged file, the same for a seed: bits flipped, cut, repeated, spliced, or with odd tokens inside."""
    random_ = random.Random(seed)
    data = bytearray(random_.choice(good))
    for _ in range(random_.choice((1, 1, 2, 4, 16))):
        at = random_.randrange(len(data) + 1)
        kind = random_.randrange(7)
        end = min(len(data), at + random_.choice((1, 2, 8, 64, len(data) + 1)))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at:end] = random_.randbytes(end - at)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = random_.choice(TOKENS)
        elif kind == 5:
            token = random_.choice(TOKENS)
            data[at : at + len(token)] = token
        else:
            other = random_.choice(good)
            data[at:] = other[random_.randrange(len(other) + 1) :]
    return bytes(data)


def peak(fresh: bool = False) -> int:
    """Most resident bytes that this process has had. fresh: forget, where Linux can, what it had before."""
    if fresh:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(
    target: Target, count: int, first: int = 0, memory: bool = False, until: float = float("inf")
) -> Outcome:  # fmt: skip
    """Read `count` damaged files, or as many as can be read `until` then on the clock `time.perf_counter`.

    memory: measure that of Python and numpy, not of the process: finer, and several times as slow.
    """
    outcome = Outcome(target.name)
    for data in target.good:  # everything is imported then
        with suppress(*target.clean):
            target.read(data)
    before = 0
    for seed in range(first, first + count):
        if outcome.tried % 1000 == 0:  # a library that leaves 30 bytes a call is no file that takes memory
            before = peak(fresh=True)
        data = mutate(target.good, seed)
        if time.perf_counter() > until:
            break
        begin = time.process_time()
        if memory:
            tracemalloc.start()
        try:
            target.read(data)
            outcome.read += 1
        except target.clean:
            outcome.refused += 1
        except BaseException as error:  # noqa: BLE001
            outcome.wrong.append(f"{target.name}, seed {seed}: {type(error).__name__}: {str(error)[:120]}")
        taken = time.process_time() - begin
        most = peak() - before
        if memory:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        outcome.slowest, outcome.grown = max(outcome.slowest, taken), max(outcome.grown, most)
        if most > target.memory + 4 * len(data):
            outcome.wrong.append(f"{target.name}, seed {seed}: {most:,} bytes of memory for {len(data):,}")
            peak(fresh=True)
        if taken > SECONDS:
            outcome.wrong.append(f"{target.name}, seed {seed}: {taken:.1f} s")
        outcome.tried += 1
    return outcome


def short(target: Target, count: int = 200) -> None:
    """For a test: no damaged file of `count` may end unclean."""
    outcome = run(target, count)
    assert not outcome.wrong, "\n".join(outcome.wrong[:5])
    assert outcome.refused > 0, f"{target.name} read every damaged file"


def main() -> int:
    """Run all TARGETS of tests/reliability/test_ROOM.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("room", help="tests/reliability/test_ROOM.py")
    parser.add_argument("count", type=int, nargs="?", default=100_000, help="damaged files for each reader")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each reader; fewer files then")
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "damaged_files.json")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))  # as pytest does, for what tests share
    if Path("/dev/shm").is_dir():
        os.environ["TMPDIR"] = "/dev/shm"  # before the first temporary file
    warnings.simplefilter("ignore")
    logging.disable()
    wrong, path = 0, asked.out
    for target in importlib.import_module(f"tests.reliability.test_{asked.room}").TARGETS:
        if asked.only not in target.name:
            continue
        begin = time.perf_counter()
        outcome = run(target, asked.count, asked.first, until=begin + asked.seconds)
        wrong += len(outcome.wrong)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        stored.setdefault(asked.room, {})[target.name] = {"first_seed": asked.first, **outcome.record()}
        path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(
            f"{target.name}: {outcome.tried:,} tried, {outcome.read:,} read, {outcome.refused:,} refused, "
            f"{len(outcome.wrong)} unclean, {time.perf_counter() - begin:.0f} s",
            *outcome.wrong[:5],
            sep="\n  ",
            flush=True,
        )
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
