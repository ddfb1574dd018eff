"""`flashar demo`: the whole experiment on the embedded digits, by the very commands a user would type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from flashar_pl.console import Missed

OUT, DATA = "runs/demo", "data/digits"
"""The places that experiments/demo_*.yaml name."""
LAST = "checkpoints/last.ckpt"
"""What a training run of the demo writes at its end."""


@dataclass
class Stage:
    """One command of the demo, run as a process of its own."""

    title: str
    seconds: float
    """Expected time on one idle core, for the time left."""
    words: list[str]
    """What follows `flashar`."""
    path: Path
    """What it makes."""
    last: str = ""
    """The file in `path` that it writes last; "" = `path` appears complete or not at all."""

    @property
    def done(self) -> bool:
        """Whether an earlier call finished it."""
        return (self.path / self.last).exists()


def demo(*, full: bool = False, out: str = OUT, data: str = DATA, overwrite: bool = False) -> Path:
    """Run the whole experiment on the embedded digits, in about 6 minutes on 2 CPU cores.

    Writes the shards, trains a classifier (for FID and accuracy) and a small raster model, post-trains FlashAR from it
    in two stages, and prints one table: raster against FlashAR against training-free diagonal decoding. Every step is a
    command of its own, which is printed. Finished steps of an interrupted run are not repeated. Results go below the
    current directory. Exits with 1 where a number misses its bound.

    Example:
        flashar demo

    Args:
        full: also train FlashAR from scratch with the same budget for contrast, and use a second sample seed.
        out: directory of all results but the shards.
        data: directory of the shards; made if missing.
        overwrite: move the results of an earlier demo aside and start again.
    """
    started, root = time.monotonic(), Path(out)
    if overwrite and root.exists():
        move_aside(root, "old")
    stages = plan_stages(root, data, full)
    report = stages[-1]
    if report.done:
        raise ValueError(
            f"{report.path} holds the results of a finished demo; read {report.path}/report.md, or run again with "
            f"--overwrite, which moves {root} aside."
        )
    todo = [stage for stage in stages if not stage.done]
    for i, stage in enumerate(todo):
        if stage.path.exists() and root in stage.path.parents:
            move_aside(stage.path, "unfinished")
        left = sum(each.seconds for each in todo[i:])
        print(f"\n[{i + 1}/{len(todo)}] {stage.title}: about {stage.seconds} s; {left} s left in all")
        code = run_process(stage)
        missed = stage is report and stage.done and code == 1
        if code != 0 and not missed:
            raise ValueError(f"`flashar {stage.words[0]}` ended with exit code {code}; its message is above.")
    print(files_made(root, data, *(stage.path for stage in stages[-2:])))
    print(f"demo: {time.monotonic() - started:.0f} s in all")
    if missed:
        raise Missed(f"a bound was missed, see {report.path}/report.md")
    return report.path


def move_aside(path: Path, why: str) -> None:
    """Rename what is at `path`. ValueError while a fit is at work in it."""
    from flashar_pl.training.run_directory import LOCK, only_one

    n = 1
    while (target := path.with_name(f"{path.name}.{why}-{n}")).exists():
        n += 1
    with only_one(path) if (path / LOCK).exists() else nullcontext():
        print(f"moved {path} to {path.rename(target)}")


def plan_stages(root: Path, data: str, full: bool) -> list[Stage]:
    """All commands in their order; overrides of the YAMLs only where other places are asked for."""
    classifier, suffix = root / "classifier", "_full" if full else ""
    learn = ["classifier", "--data", data, "--out", str(classifier)]
    stages = [
        Stage("shards of codes", 5, ["tokenize", "digits", "--out", data], Path(data), "manifest.json"),
        Stage("classifier for FID and accuracy", 6, learn, classifier, "classifier.json"),
        _fit("raster pre-training", 220, "raster", root, data),
        _fit("FlashAR post-training, two stages", 55, "flashar", root, data),
    ]
    if full:
        stages.append(_fit("FlashAR from scratch", 60, "scratch", root, data))
    runs = [stage.path for stage in stages[2:]]
    convergence, report = root / f"convergence{suffix}.png", root / f"report{suffix}"
    draw = ["plot", *map(str, runs), "--out", str(convergence)]
    stages.append(Stage("convergence curves", 10, draw, convergence))
    compare = ["report", "--data", data, "--classifier", str(classifier), "--out", str(report), "--check"]
    for run in runs:
        compare += [f"--{run.name}", str(run / LAST)]
    return [*stages, Stage("report", 30, compare + (["--seeds", "0,1"] if full else []), report)]


def _fit(title: str, seconds: float, run: str, root: Path, data: str) -> Stage:
    """One training run."""
    words = ["fit", "--config", f"experiments/demo_{run}.yaml"]
    if root != Path(OUT):
        words += ["--trainer.default_root_dir", str(root / run)]
        words += ["--model.validation.features", str(root / "classifier")]
        if run == "flashar":
            words += ["--model.init_from", str(root / "raster" / LAST)]
    if data != DATA:
        words += ["--data.shards", data]
    return Stage(title, seconds, words, root / run, LAST)


def start(stage: Stage) -> subprocess.Popen[bytes]:
    """Start a stage on one thread, and print its command."""
    print(f"$ flashar {shlex.join(stage.words)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "flashar_pl.cli", *stage.words], env=environment)


def run_process(stage: Stage) -> int:
    """Run a stage; its exit code. An interrupt reaches the stage too, and is passed on after it."""
    process = start(stage)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    return code


def files_made(root: Path, data: str, convergence: Path, report: Path) -> str:
    """What the demo leaves, for the reader."""
    checkpoint = f"--checkpoint {root}/flashar/{LAST}"
    return f"""
files:
  report                {report}/report.md, {report}/report.json
  samples side by side  {report}/samples.png
  gate map              {report}/gate.png
  convergence           {convergence}
  TensorBoard           tensorboard --logdir {root}
  checkpoints           {root}/raster/{LAST}, {root}/flashar/{LAST}
  shards                {data}/manifest.json
  classifier            {root}/classifier

and now:
  draw in a browser     flashar serve {checkpoint} --cfg-scale 1.5
  more samples          flashar generate {checkpoint} --classes 0-9 --cfg-scale 1.5 --out {root}/more
  which layers to fork  flashar probe --checkpoint {root}/raster/{LAST} --data {data} --out {root}/probe"""
