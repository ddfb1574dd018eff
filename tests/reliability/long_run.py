"""A training of 2,000 steps in which memory, open files and processes must not grow: `make reliability-long`.

It logs every 10 steps, saves every 50 and validates every 100, with averaged weights and two workers that begin again
in each of 42 epochs, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from training_toys import ValidationConfig, fit, make_module, write_digit_like  # noqa: E402

from flashar_pl.training.logger import RunLogger  # noqa: E402

GROWTH = 16 * 2**20
"""Bytes that the second half of the steps may add."""


class Watch(Callback):
    """Memory, open files and child processes at every hundredth step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % 100 == 50:  # away from validations and from ends of epochs of other lengths
            self.seen.append({"step": trainer.global_step, **use()})


def use() -> dict[str, int]:
    """Of this process."""
    status = Path("/proc/self/status").read_text()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    files = len(os.listdir("/proc/self/fd"))
    return {"bytes": 1024 * int(status.split("VmRSS:")[1].split()[0]), "files": files, "processes": len(children)}


def wrong(seen: list[dict[str, int]]) -> list[str]:
    """What grew between the middle and the end."""
    middle, end = seen[len(seen) // 2], seen[-1]
    found = [f"{key} grow from {middle[key]} to {end[key]}" for key in ("files", "processes") if end[key] > middle[key]]
    if end["bytes"] > middle["bytes"] + GROWTH:
        found.append(f"memory grows from {middle['bytes'] >> 20} to {end['bytes'] >> 20} MiB")
    return found


def run(steps: int, root: Path) -> list[dict[str, int]]:
    """Train, and what was seen."""
    watch = Watch()
    save = ModelCheckpoint(root / "checkpoints", filename="last", every_n_train_steps=50, enable_version_counter=False)
    module = make_module(ema_decay=0.9, validation=ValidationConfig(grid_images=2))
    fit(
        root, write_digit_like(root / "shards"), module, max_steps=steps,
        data={"batch_size": 1, "num_workers": 2, "validation_batch_size": 8},
        val_check_interval=100, check_val_every_n_epoch=None, limit_val_batches=1.0, log_every_n_steps=10,
        enable_checkpointing=True, callbacks=[save, watch], logger=RunLogger(str(root), name="", version=""),
    )  # fmt: skip
    return watch.seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", type=int, nargs="?", default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "long_run.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(asked.steps, Path(folder))
    found = wrong(seen)
    asked.out.write_text(json.dumps({"torch": torch.__version__, "grown": found, "seen": seen}, indent=1) + "\n")
    print(*(f"{each}" for each in (seen[0], seen[len(seen) // 2], seen[-1])), *found, sep="\n")
    return min(len(found), 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
