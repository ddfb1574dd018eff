"""Small damage to the files of a run, one at a time, and what their readers give: found, the same, or silently another.

    python -m tests.reliability.bits 1000

A file has one bit flipped, is cut off, or has two of its pieces exchanged. It is found where its reader says so, and
the same where what was read is equal to the last bit (padding between tensors, say).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

import tiny  # noqa: E402
from training_toys import write_digit_like  # noqa: E402

from flashar_pl.checkpoints.description import Description  # noqa: E402
from flashar_pl.checkpoints.runs import RunCheckpoint  # noqa: E402
from flashar_pl.checkpoints.sharded import INDEX, META, write_sharded  # noqa: E402
from flashar_pl.checkpoints.weights import load_model, save_model  # noqa: E402
from flashar_pl.data.manifest import Manifest  # noqa: E402
from flashar_pl.data.shards import ShardReader  # noqa: E402
from tests.reliability.kills import unlike  # noqa: E402


@dataclass(frozen=True)
class Kind:
    """A file, and what its reader makes of it."""

    name: str
    path: Path
    read: Callable[[], Any]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One bit flipped in eight of ten, else cut off, or two pieces exchanged."""
    content, at = bytearray(data), chance.randrange(len(data))
    kind = chance.randrange(10)
    if kind < 8:
        content[at] ^= 1 << chance.randrange(8)
    elif kind == 8:
        del content[at:]
    else:
        long = min(chance.choice((1, 16, 256)), len(content) // 2)
        one, other = sorted(chance.sample(range(0, len(content) - long + 1, long), 2))
        content[one : one + long], content[other : other + long] = data[other : other + long], data[one : one + long]
    return bytes(content)


def kinds(root: Path) -> list[Kind]:
    """The files of a small run, and their readers."""
    model = tiny.flashar()
    note = Description(model.config(), (4, 4), {"kind": "pixels", "levels": tiny.VOCABULARY})
    weights = {f"net.{name}": value for name, value in model.state_dict().items()}
    rest = {"flashar": note.to_dict(), "global_step": 7, "loops": {"done": list(range(9))}}
    last, sharded, converted = root / "last.ckpt", root / "sharded.ckpt", root / "model"
    torch.save({"state_dict": weights, **rest}, last)
    write_sharded(sharded, weights, rest, True)
    save_model(converted, model, note)
    shards = Path(write_digit_like(root / "shards"))

    def run(path: Path) -> Any:
        stored = RunCheckpoint(path)
        return [{**stored.content, "state_dict": None}, stored.tensors({name: name for name in stored.names()})]

    def samples() -> Any:
        reader = ShardReader(Manifest.load(shards), "train")
        found = reader.read(np.arange(len(reader)))
        return {name: torch.from_numpy(getattr(found, name)) for name in ("codes", "ids", "labels")}

    loaded = lambda: dict(load_model(converted).model.state_dict())  # noqa: E731
    return [
        Kind("last.ckpt", last, lambda: run(last)),
        Kind("sharded meta.pt", sharded / META, lambda: run(sharded)),
        Kind("sharded .metadata", sharded / INDEX, lambda: run(sharded)),
        Kind("sharded .distcp", next(sharded.glob("*.distcp")), lambda: run(sharded)),
        Kind("model.safetensors", converted / "model.safetensors", loaded),
        Kind("config.json", converted / "config.json", loaded),
        Kind("shard", next(shards.glob("train-*.tar")), samples),
        Kind("manifest.json", shards / "manifest.json", samples),
    ]


def count(kind: Kind, tries: int, seed: int) -> dict[str, Any]:
    """What became of so many damaged copies of a file. A message on stderr that names it counts as found."""
    good, before = kind.path.read_bytes(), kind.read()
    chance, total, silent = random.Random(f"{kind.name}{seed}"), Counter[str](), []
    while total.total() < tries:
        data = damaged(good, chance)
        if data == good:
            continue
        kind.path.unlink()
        kind.path.write_bytes(data)  # a new file: one that was found whole is not compared again
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                differs = unlike(before, kind.read())
            outcome = "found" if kind.path.name in said.getvalue() else "silent" if differs else "same"
        except ValueError as error:
            named = kind.path.name in str(error) or str(kind.path.parent) in str(error)  # or the file beside it
            outcome, differs = "found" if named else "found, unnamed", [str(error)[:200]]
        except Exception as error:  # noqa: BLE001
            outcome, differs = "unclean", [repr(error)[:200]]
        total[outcome] += 1
        if outcome not in ("found", "same") and len(silent) < 5:
            silent.append({"what": outcome, "try": total.total() - 1, "differs": differs[:3]})
    kind.path.write_bytes(good)
    return {"tried": tries, **total, "examples": silent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tries", type=int, nargs="?", default=1000, help="damaged copies of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "damaged_runs.json")
    asked = parser.parse_args()
    counts = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for kind in kinds(Path(folder)):
            counts[kind.name] = count(kind, asked.tries, asked.seed)
            print(kind.name, json.dumps(counts[kind.name]), flush=True)
    asked.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(any({"silent", "unclean"} & each.keys() for each in counts.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
