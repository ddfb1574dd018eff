"""Kills small trainings at random moments, continues them from their newest checkpoint, and counts what differs.

    make reliability-kills ARGS="--single 100 --ddp 20 --fsdp 20 --background 20 --seed 0"

A trial is one run of a random variant that is killed up to three times: with SIGKILL, on one rank at random, or with
SIGTERM or SIGINT on all. Its end is compared with that of the same run without kills: every tensor and number of the
last checkpoint (weights, averages, moments, schedule, generators, loops, place in the data) and every point of the
curves, speeds excepted. Processes are forked from this one, which imports everything once and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from processes import free_port  # noqa: E402
from training_toys import NOT_REPEATED, ValidationConfig, fit, make_module, write_digit_like  # noqa: E402

from flashar_pl.console import code_version  # noqa: E402
from flashar_pl.training.config import (  # noqa: E402
    BlockDiffusionConfig,
    FlashARConfig,
    IntraConfig,
    LossConfig,
    PARConfig,
)
from flashar_pl.training.logger import RunLogger  # noqa: E402
from flashar_pl.training.sharded.strategy import ShardedStrategy  # noqa: E402

PATIENCE = 60
"""Seconds after a kill in which the other ranks must have ended."""
WRITING = 0.3
"""Seconds that a checkpoint of kind background takes more, between its files and its name."""
KINDS = ("single", "ddp", "fsdp", "background")

SHOWN = {"validation": ValidationConfig(grid_images=2)}
METHODS: dict[str, dict[str, Any]] = {
    "FlashAR": SHOWN,
    "distillation": SHOWN | {"losses": LossConfig(distillation=0.2)},
    "groups of a diagonal": SHOWN | {"flashar": FlashARConfig(branch_layer=1, intra=IntraConfig())},
    "systematic": {"validation": ValidationConfig(grid_images=2, coupling="systematic")},
    "a mixture of two data sets": SHOWN,
    "PAR": SHOWN | {"flashar": None, "par": PARConfig()},
    "BlockDiffusion": SHOWN | {"flashar": None, "block_diffusion": BlockDiffusionConfig("sub4x4", steps=2)},
    "BlockDiffusion, clean context": SHOWN
    | {"flashar": None, "block_diffusion": BlockDiffusionConfig("row", clean_context=True, steps=2)},
}
"""Arguments of the module by what is trained."""


@dataclass(frozen=True)
class Variant:
    """A run of 14 steps, 2 of stage 1; an epoch has 6 batches."""

    kind: str
    """single, ddp, fsdp or background, which is fsdp that trains while it saves; all but single have two ranks."""
    ema: bool
    accumulate: int
    workers: int
    save: int
    """Steps between checkpoints."""
    validate: int
    """Steps between validations."""
    method: str
    """What is trained: see `METHODS`. BlockDiffusion draws no samples from shards."""

    @classmethod
    def draw(cls, kind: str, chance: random.Random) -> Variant:
        pick = chance.choice
        how = pick((False, True)), pick((1, 2, 3)), pick((0, 0, 2)), pick((1, 2, 3, 5)), pick((2, 3, 4))
        return cls(kind, *how, pick([name for name in METHODS if kind in ("single", "ddp") or "Block" not in name]))

    @property
    def ranks(self) -> int:
        return 1 if self.kind == "single" else 2


def train(variant: Variant, shards: str, root: Path) -> None:
    """Begin, or continue from the newest checkpoint."""
    kept = sorted((root / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    save = ModelCheckpoint(
        root / "checkpoints", filename="last", every_n_train_steps=variant.save, enable_version_counter=False
    )
    sharded = ShardedStrategy("fp32", background=variant.kind == "background")
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(variant.kind, sharded)
    if sharded.background:
        write = dcp.save
        dcp.save = lambda *given, **named: (write(*given, **named), time.sleep(WRITING))
    mixed = {shards: 2.0, f"{shards}_2": 1.0} if "mixture" in variant.method else shards
    fit(
        root, mixed, make_module(ema_decay=0.5 if variant.ema else None, **METHODS[variant.method]),
        kept[-1] if kept else None, data={"num_workers": variant.workers, "validation_batch_size": 8},
        devices=variant.ranks, strategy=strategy, max_steps=14, accumulate_grad_batches=variant.accumulate,
        val_check_interval=variant.validate, check_val_every_n_epoch=None, limit_val_batches=1.0, log_every_n_steps=1,
        enable_checkpointing=True, callbacks=[save], logger=RunLogger(str(root), name="", version=""),
    )  # fmt: skip


def start(variant: Variant, shards: str, root: Path) -> list[int]:
    """The processes of a run."""
    root.mkdir(exist_ok=True)
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "NODE_RANK": "0", "WORLD_SIZE": str(variant.ranks)}
    started = []
    for rank in range(variant.ranks):
        pid = os.fork()
        if pid:
            started.append(pid)
            continue
        code = 1
        try:
            said = os.open(root / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1), os.dup2(said, 2)
            if variant.ranks > 1:
                os.environ.update(job | {"LOCAL_RANK": str(rank)})
            train(variant, shards, root)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    return started


def finish(pids: list[int]) -> tuple[list[int], int]:
    """(exit codes, how many did not end by themselves)."""
    codes, late, left = [], 0, time.monotonic() + PATIENCE
    for pid in pids:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > left:
                late += 1
                os.kill(pid, signal.SIGKILL)
                left = float("inf")
            time.sleep(0.005)
    return codes, late


def trial(variant: Variant, shards: str, root: Path, seconds: float, chance: random.Random) -> dict[str, Any]:
    """One run with its kills: what was sent, when, and whether somebody was left over."""
    kills, late = [], 0
    for _ in range(chance.randint(1, 3)):
        pids = start(variant, shards, root)
        time.sleep(chance.uniform(0.05, 1.0) * seconds)
        name = chance.choice(["SIGKILL"] * 4 + ["SIGTERM", "SIGINT"])
        targets = [chance.choice(pids)] if name == "SIGKILL" else pids
        for pid in targets:
            os.kill(pid, signal.Signals[name])  # not waited for yet, so it is still ours
        codes, over = finish(pids)
        late += over
        kept, parts = (len(list((root / "checkpoints").glob(names))) for names in ("*.ckpt", ".*.part"))
        kills.append({"signal": name, "codes": codes, "checkpoints": kept, "writing": parts})
        if not any(codes):
            break  # it was done
    codes, over = finish(start(variant, shards, root))
    return {"kills": kills, "end": codes, "left_over": late + over}


def last(root: Path) -> Any:
    """The end of a run: its last checkpoint, without names of files."""
    path = root / "checkpoints" / "last.ckpt"
    if path.is_dir():
        from flashar_pl.checkpoints.runs import RunCheckpoint

        stored = RunCheckpoint(path)
        content = {**stored.content, "state_dict": stored.tensors({name: name for name in stored.names()})}
    else:
        content = torch.load(path, weights_only=True)
    states = content["callbacks"]
    content["callbacks"] = {name: states[name] for name in states if not name.startswith("ModelCheckpoint")}
    content["callbacks"].pop("TrainingLog", None)  # has a speed
    content.pop("digests", None)
    return content


def curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    """All points, without speeds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - set(NOT_REPEATED)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def unlike(a: Any, b: Any, place: str = "") -> list[str]:
    """Places where two values differ, of the same kind or bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for key in a.keys() | b.keys() for x in unlike(a.get(key), b.get(key), f"{place}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [x for i, (one, other) in enumerate(zip(a, b, strict=True)) for x in unlike(one, other, f"{place}/{i}")]
    return [] if a == b else [place]


def count(kind: str, trials: int, seed: int, until: float = float("inf")) -> dict[str, Any]:
    """Trials of one kind. Stops early at `until` on the clock `time.monotonic`."""
    chance, whole = random.Random(f"{kind}{seed}"), dict[Variant, tuple[float, Any, Any]]()
    total = dict.fromkeys(
        ("trials", "kills", "SIGKILL", "SIGTERM", "SIGINT", "writing", "same_end", "same_curves", "left_over"), 0
    )
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_digit_like(Path(folder) / "shards")
        write_digit_like(Path(folder) / "shards_2", seed=1)
        for number in range(trials):
            if time.monotonic() > until:
                break
            variant = Variant.draw(kind, chance)
            if variant not in whole:
                root, began = Path(folder) / f"whole_{len(whole)}", time.monotonic()
                codes, _ = finish(start(variant, shards, root))
                assert not any(codes), (root / "log_0.txt").read_text()[-3000:]
                whole[variant] = time.monotonic() - began, last(root), curves(root)
            seconds, end, points = whole[variant]
            root = Path(folder) / f"trial_{number}"
            result = trial(variant, shards, root, seconds, chance)
            total["trials"] += 1
            total["left_over"] += result["left_over"]
            for kill in result["kills"]:
                total["kills"] += 1
                total[kill["signal"]] += 1
                total["writing"] += kill["writing"]
            if any(result["end"]):
                differs, shifted = [f"ended with {result['end']}: {(root / 'log_0.txt').read_text()[-1500:]}"], ["?"]
            else:
                differs, shifted = unlike(end, last(root)), unlike(points, curves(root))
            total["same_end"] += not differs
            total["same_curves"] += not shifted
            if differs or shifted or result["left_over"]:
                failures.append({"variant": asdict(variant), **result, "differs": differs[:5], "curves": shifted[:5]})
            shutil.rmtree(root)
    return {**total, "variants": len(whole), "seed": seed, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, trials in zip(KINDS, (60, 12, 12, 12), strict=True):
        parser.add_argument(f"--{kind}", type=int, default=trials, help=f"trials of kind {kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=METHODS, help="runs of one method")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after that, for each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kills.json")
    options = parser.parse_args()
    if options.only is not None:
        for name in METHODS.keys() - {options.only}:
            del METHODS[name]
    counts = {}
    for kind in KINDS:
        counts[kind] = count(kind, getattr(options, kind), options.seed, time.monotonic() + 60 * options.minutes)
        print(kind, json.dumps({**counts[kind], "failures": len(counts[kind]["failures"])}), flush=True)
        about = {"torch": torch.__version__, "commit": code_version().get("commit")}
        options.out.write_text(json.dumps({**about, **counts}, indent=1) + "\n", encoding="utf-8")
    return int(any(each["failures"] for each in counts.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
