"""`flashar sweep`: the training runs of one file, over settings and seeds, by the very commands a user would type."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from flashar_pl.commands.demo import LAST, Stage, move_aside, run_process
from flashar_pl.console import closest, versions
from flashar_pl.files import write_json
from flashar_pl.recipes import find_recipe
from flashar_pl.text_files import read_field, read_yaml

FINISHED = "sweep.json"
"""What a finished run holds: its command, its time and the versions it ran with."""
RASTER = "raster"
"""Folder of the pre-trained models."""
SEED_STRIDE = 100
"""Adaptation seed a of pre-training seed p is SEED_STRIDE * p + a: a new draw for every pre-trained model."""


@dataclass(frozen=True)
class Runs:
    """Runs of one YAML."""

    config: str
    """A YAML of experiments/."""
    seeds: list[int]
    """One run for each, with the seed of the weights and of the order of the data."""
    set: dict[str, Any] = field(default_factory=dict)
    """Options of `flashar fit` for all of them."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder -> its own options."""

    def stages(self, root: Path, folder: str, first: int = 0, start: Sequence[str] = ()) -> Iterator[Stage]:
        """A run for each seed and variant. folder: what stands before its seed in its folder's name; first: what is
        added to its seed; start: options of `flashar fit` for all of them."""
        for number in self.seeds:
            for name, own in (self.variants or {RASTER: {}}).items():
                place, seed = root / name / f"{folder}{number}", first + number
                words = ["fit", "--config", self.config, "--trainer.default_root_dir", str(place)]
                for key, value in {"seed_everything": seed, "data.seed": seed, **self.set, **own}.items():
                    words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
                yield Stage(f"{place.parent.name}/{place.name}", 0, [*words, *start], place, FINISHED)


@dataclass(frozen=True)
class Sweep:
    """What a file says."""

    out: str
    """Directory of all runs."""
    adaptation: Runs
    """Post-training, `seeds` times for every variant and raster model."""
    pretraining: Runs | None = None
    """The raster models; None = the YAML of the adaptation names the weights it starts from."""
    prepare: dict[str, str] = field(default_factory=dict)
    """File -> the command that makes it."""
    scratch: Runs | None = None
    """Models that start from random weights."""
    compare: dict[str, Any] = field(default_factory=dict)
    """Options of `flashar compare` for the summary; {} = none is made."""

    def runs(self) -> Iterator[Stage]:
        """Every training run, a raster model before those that start from it."""
        root, before = Path(self.out), self.pretraining
        if before is None:
            yield from self.adaptation.stages(root, "a")
        else:
            for p, raster in zip(before.seeds, before.stages(root, "p"), strict=True):
                yield raster
                start = ["--model.init_from", str(raster.path / LAST)]
                yield from self.adaptation.stages(root, f"p{p}a", SEED_STRIDE * p, start)
        if self.scratch is not None:
            yield from self.scratch.stages(root, "s")

    def summary(self) -> Stage | None:
        """The comparison of all runs."""
        if not self.compare:
            return None
        names = list(dict.fromkeys(stage.path.parent for stage in self.runs()))
        words = ["compare", *map(str, names)]
        for key, value in self.compare.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return Stage("comparison", 0, words, Path(str(self.compare.get("out"))))


def sweep(file: str, /, *, dry_run: bool = False) -> Path:
    """Run every training run of a file, one after another, and compare them.

    The file says where the runs go (out), which files are made first and how (prepare), the raster models
    (pretraining), what is post-trained from each (adaptation), what starts from random weights (scratch), and options
    of the summary (compare). Each group of runs has a YAML of experiments/ (config), seeds, options for all (set) and,
    but for raster models, variants: a folder and its own options. Every run is a `flashar fit` of its own, which is
    printed. The same command given again leaves finished runs alone and continues the one that was stopped.

    Example:
        flashar sweep experiments/ablations/digits.yaml --dry-run
        flashar sweep experiments/ablations/digits.yaml

    Args:
        file: a YAML such as experiments/ablations/digits.yaml.
        dry_run: print the commands that are left, and run none.
    """
    asked = read_sweep(find_recipe(file))
    runs, summary = list(asked.runs()), asked.summary()
    check_options(runs, summary)
    todo = [stage for stage in (*prepared(asked), *runs) if not finished(stage)]
    if summary is not None and (todo or not summary.done):
        todo.append(summary)
    if dry_run:
        print("\n".join(f"flashar {shlex.join(stage.words)}" for stage in todo))
        return Path(asked.out)
    for number, stage in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {stage.title}")
        if stage is summary and summary.done:
            move_aside(summary.path, "old")
        run_stage(stage)
    print(f"all {len(runs)} runs of {file} are finished: {asked.out}")
    return Path(asked.out)


def run_stage(stage: Stage) -> None:
    """Run a stage, or continue a training run that was stopped. ValueError where the command fails."""
    training = stage.words[0] == "fit"
    if training and stage.path.is_dir() and not list((stage.path / "checkpoints").glob("*.ckpt")):
        move_aside(stage.path, "unfinished")  # it was stopped before its first checkpoint
    started = time.monotonic()
    if code := run_process(stage):
        raise ValueError(f"`flashar {stage.words[0]}` of {stage.title} ended with exit code {code}; see above.")
    if training:
        found = {"words": stage.words, "seconds": round(time.monotonic() - started, 1), "versions": versions()}
        write_json(stage.path / FINISHED, found)


def prepared(asked: Sweep) -> list[Stage]:
    """The files that are made first."""
    return [Stage(name, 0, shlex.split(command), Path(name)) for name, command in asked.prepare.items()]


def finished(stage: Stage) -> bool:
    """Whether an earlier call finished a stage. Raises ValueError for a run that had other options."""
    if not stage.done or stage.words[0] != "fit":
        return stage.done
    if (found := read_field(stage.path / FINISHED, "words", list)) != stage.words:
        raise ValueError(
            f"{stage.path} holds the run `flashar {shlex.join(map(str, found))}`, the file asks for `flashar "
            f"{shlex.join(stage.words)}`; move {stage.path} aside, or let the file name another out."
        )
    return True


def check_options(runs: list[Stage], summary: Stage | None) -> None:
    """ValueError for an option that `flashar fit` or `flashar compare` does not take, before the first run."""
    from flashar_pl.commands.arguments import parse
    from flashar_pl.training.lightning_cli import ExperimentCLI

    for words in {stage.path.parent: stage.words for stage in runs}.values():
        ExperimentCLI(words[0], words[1:], parse_only=True)
    if summary is not None:
        from flashar_pl.commands.compare import compare

        parse(compare, "flashar compare", summary.words[1:])


# --- the file ---------------------------------------------------------------------------------------------------------


def read_sweep(path: Path) -> Sweep:
    """Read a file. ValueError for a key that is missing or unknown (the closest one is named), or another value."""
    values = _checked(Sweep, read_yaml(path), str(path))
    for name in ("pretraining", "adaptation", "scratch"):
        if values.get(name) is not None:
            values[name] = Runs(**_checked(Runs, values[name], f"{path}: {name}"))
            _check_runs(values[name], f"{path}: {name}", needs_variants=name != "pretraining")
    return Sweep(**values)


def _checked(kind: type, values: Any, where: str) -> dict[str, Any]:
    """The values of a dataclass, each of the shape of its default."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; expected {', '.join(each.name for each in fields(kind))}.")
    known = {each.name: each for each in fields(kind)}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where} has no {unknown[0]}; {closest(str(unknown[0]), known)}")
    needed = [name for name, each in known.items() if each.default is each.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where} needs {' and '.join(missing)}.")
    for name, each in known.items():
        if each.default_factory is not MISSING and not isinstance(values.get(name, {}), dict):
            raise ValueError(f"{where}: {name} is {values[name]!r}; expected named values.")
    return values


def _check_runs(runs: Runs, where: str, needs_variants: bool) -> None:
    seeds = runs.seeds
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < SEED_STRIDE for s in seeds):
        raise ValueError(f"{where}: seeds is {seeds!r}; expected whole numbers from 0 to {SEED_STRIDE - 1}.")
    if needs_variants != bool(runs.variants):
        raise ValueError(f"{where}: {'expected' if needs_variants else 'raster models have no'} variants.")
    for name, own in runs.variants.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(name)) or name == RASTER:
            raise ValueError(f"{where}: variant {name!r}; expected letters, digits, - and _, and not {RASTER}.")
        if not isinstance(own, dict):
            raise ValueError(f"{where}: variant {name} is {own!r}; expected options such as {{model.aux_weight: 0}}.")
