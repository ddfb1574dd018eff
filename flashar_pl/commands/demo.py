"""`flashar demo`: the whole experiment on the embedded digits, by the very commands a user would type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flashar_pl.commands.plot import plot
from flashar_pl.commands.tokenize import tokenize_digits
from flashar_pl.console import Missed

OUT, DATA = "runs/demo", "data/digits"
"""The places that experiments/demo_*.yaml name."""


@dataclass
class Stage:
    """One sub-process of the demo."""

    title: str
    words: list[str]
    """What follows `flashar`."""
    seconds: float
    """Expected time on one idle core, for the time left."""
    directory: Path
    """Where it writes."""
    last: str = ""
    """The file in `directory` that it writes last; "" = the directory itself."""
    background: bool = False
    log: Path | None = None

    @property
    def done(self) -> bool:
        """Whether an earlier call finished it."""
        return (self.directory / self.last).exists()


def demo(*, full: bool = False, out: str = OUT, data: str = DATA, overwrite: bool = False) -> Path:
    """Run the whole experiment on the embedded digits, in about 6 minutes on 2 CPU cores.

    Writes the shards, trains a classifier (for FID and accuracy) and a small raster model, post-trains FlashAR from it
    in two stages, and prints one table: raster against FlashAR against training-free diagonal decoding. Every step is a
    command of its own, which is printed. Finished steps of an interrupted run are not repeated. Run it in a checkout
    of the repository, where experiments/ is. Exits with 1 where a number misses its bound.

    Example:
        flashar demo

    Args:
        full: also train FlashAR from scratch with the same budget for contrast, and use a second sample seed.
        out: directory of all results but the shards.
        data: directory of the shards; made if missing.
        overwrite: move the results of an earlier demo aside and start again.
    """
    started = time.monotonic()
    root, name = Path(out), "report_full" if full else "report"
    _check_place()
    if overwrite and root.exists():
        print(f"moved {root} to {_move_aside(root, 'old')}")
    report = root / name
    if report.exists():
        raise ValueError(
            f"{report} holds the results of a finished demo; read {report}/report.md, or run again with --overwrite, "
            f"which moves {root} aside."
        )
    if not (Path(data) / "manifest.json").exists():
        print(f"$ flashar tokenize digits --out {data}")
        tokenize_digits(out=data)
    stages = plan_stages(root, data, full)
    for stage in stages:
        if not stage.done and stage.directory.exists():
            print(f"moved the unfinished {stage.directory} to {_move_aside(stage.directory, 'unfinished')}")
    run_stages(stages)
    convergence = root / f"convergence{'_full' if full else ''}.png"
    if not convergence.exists():
        runs = [str(root / run) for run in ("raster", "flashar", *(["scratch"] if full else []))]
        print(f"$ flashar plot {' '.join(runs)} --out {convergence}")
        plot(*runs, out=str(convergence))
    print("\nreport: about 30 s")
    code = run_process(Stage("report", report_words(root, data, name, full), 30, report))
    if code not in (0, 1) or not report.exists():
        raise ValueError(f"`flashar report` ended with exit code {code}; its message is above.")
    print(files_made(root, data, report, convergence))
    print(f"demo: {time.monotonic() - started:.0f} s in all")
    if code == 1:
        raise Missed(f"a bound was missed, see {report}/report.md")
    return report


def _check_place() -> None:
    """ValueError unless the working directory has the demo's configurations."""
    if not Path("experiments/demo_raster.yaml").exists():
        raise ValueError(
            f"looked for experiments/demo_raster.yaml in {Path.cwd()}; run the demo in a checkout of the repository."
        )


def _move_aside(path: Path, why: str) -> Path:
    n = 1
    while (target := path.with_name(f"{path.name}.{why}-{n}")).exists():
        n += 1
    path.rename(target)
    return target


def plan_stages(root: Path, data: str, full: bool) -> list[Stage]:
    """Classifier and training runs, in the order they start; overrides only where places differ from the YAML's."""
    features = root / "classifier"
    stages = [
        Stage(
            "classifier for FID and accuracy",
            ["classifier", "--data", data, "--out", str(features)],
            6,
            features,
            "classifier.json",
        )
    ]
    if full:
        stages.append(_fit("FlashAR from scratch, in the background", "scratch", root, data, background=True))
    stages.append(_fit("raster pre-training", "raster", root, data))
    stages.append(_fit("FlashAR post-training, two stages", "flashar", root, data))
    return stages


SECONDS = {"raster": 220.0, "flashar": 55.0, "scratch": 60.0}
"""Expected seconds of the training runs on one idle core."""
LAST = "checkpoints/last.ckpt"
"""What a training run of the demo writes at its end."""


def _fit(title: str, run: str, root: Path, data: str, background: bool = False) -> Stage:
    """One training run."""
    words = ["fit", "--config", f"experiments/demo_{run}.yaml"]
    if root != Path(OUT):
        words += ["--trainer.default_root_dir", str(root / run)]
        words += ["--model.validation.features", str(root / "classifier")]
        if run == "flashar":
            words += ["--model.init_from", str(root / "raster" / LAST)]
    if data != DATA:
        words += ["--data.shards", data]
    return Stage(title, words, SECONDS[run], root / run, LAST, background)


def report_words(root: Path, data: str, name: str, full: bool) -> list[str]:
    """The report's command."""
    checkpoints = {run: str(root / run / LAST) for run in ("raster", "flashar", "scratch")}
    words = ["report", "--raster", checkpoints["raster"], "--flashar", checkpoints["flashar"]]
    words += ["--data", data, "--classifier", str(root / "classifier"), "--out", str(root / name), "--check"]
    return [*words, "--scratch", checkpoints["scratch"], "--seeds", "0,1"] if full else words


# --- processes ------------------------------------------------------------------------------------------------------


def run_stages(stages: list[Stage]) -> None:
    """Run what is not done yet; background stages beside the others, with their output in a log file.

    Raises:
        ValueError: a stage failed; its own message was printed, or stands in its log.
    """
    todo = [stage for stage in stages if not stage.done]
    background: list[tuple[Stage, subprocess.Popen[bytes]]] = []
    pace = 1.0
    try:
        for i, stage in enumerate(todo):
            in_turn = sum(s.seconds for s in todo[i:] if not s.background)
            left = pace * max(in_turn, *(s.seconds for s in todo if s.background), 0) + 30
            count = f"[{i + 1}/{len(todo) + 1}]"
            print(f"\n{count} {stage.title}: about {pace * stage.seconds:.0f} s; {left:.0f} s left in all")
            if stage.background:
                stage.log = stage.directory.with_suffix(".log")
                background.append((stage, start(stage)))
                continue
            begun = time.monotonic()
            code = run_process(stage)
            if code != 0:
                raise ValueError(f"`flashar {stage.words[0]}` ended with exit code {code}; its message is above.")
            if stage.seconds > 20:
                pace = max(0.5, (time.monotonic() - begun) / stage.seconds)
        for stage, process in background:
            if process.wait() != 0:
                raise ValueError(f"`flashar {stage.words[0]}` failed; its message is in {stage.log}.")
    finally:
        for _, process in background:
            if process.poll() is None:
                process.terminate()
                process.wait()


def start(stage: Stage) -> subprocess.Popen[bytes]:
    """Start a stage on one thread, and print its command."""
    print(f"$ flashar {shlex.join(stage.words)}" + (f" > {stage.log}" if stage.log else ""), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "flashar_pl.cli", *stage.words]
    if stage.log is None:
        return subprocess.Popen(words, env=environment)
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    with stage.log.open("wb") as stream:
        return subprocess.Popen(words, env=environment, stdout=stream, stderr=stream)


def run_process(stage: Stage) -> int:
    """Run a stage in the foreground; its exit code. An interrupt reaches the stage too, and is passed on after it."""
    process = start(stage)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    return code


def files_made(root: Path, data: str, report: Path, convergence: Path) -> str:
    """What the demo leaves, for the reader."""
    runs = [run for run in ("raster", "flashar", "scratch") if (root / run).exists()]
    lines = [
        ("report", f"{report}/report.md, {report}/report.json"),
        ("samples side by side", f"{report}/samples.png"),
        ("gate map", f"{report}/gate.png"),
        ("convergence", str(convergence)),
        ("TensorBoard", f"tensorboard --logdir {root}"),
        ("checkpoints", ", ".join(f"{root}/{run}/{LAST}" for run in runs)),
        ("shards", f"{data}/manifest.json"),
        ("classifier", f"{root}/classifier"),
    ]
    checkpoint = f"--checkpoint {root}/flashar/{LAST}"
    further = [
        ("draw in a browser", f"flashar serve {checkpoint} --cfg-scale 1.5"),
        ("more samples", f"flashar generate {checkpoint} --classes 0-9 --cfg-scale 1.5 --out {root}/more"),
        ("which layers to fork", f"flashar probe --checkpoint {root}/raster/{LAST} --data {data} --out {root}/probe"),
    ]
    parts = []
    for title, entries in (("files:", lines), ("and now:", further)):
        parts += ["", title, *(f"  {what:<21} {text}" for what, text in entries)]
    return "\n".join(parts)
