"""`flashar compare`: runs side by side on the same held-out images, with the standard errors of their differences.

Shapes: N images of the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.compare_page import draw, markdown
from flashar_pl.commands.plot import require_pyplot
from flashar_pl.commands.score import DataOptions, caption_encoder, conditions_of, likelihoods
from flashar_pl.console import closest, versions
from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import AssetOptions, ModelOptions, PlanOptions, check_least, parse_classes
from flashar_pl.text_files import flatten, read_field

if TYPE_CHECKING:
    import numpy as np

    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge

KEPT = ("best.ckpt", "last.ckpt")
"""Of a run's checkpoints the first that is there is compared."""
SPEED = ("ms_per_image", "images_per_s", "runner", "weight_format", "time")
"""What is shown of a row of a benchmark."""


@dataclass(frozen=True)
class CompareOptions:
    """Comparison"""

    out: str
    """Directory to make; it must not exist."""
    reference: str | None = None
    """Row that the others are compared with. Default: the first."""
    classifier: str | None = None
    """Directory of a metric network, as `flashar classifier` makes it; without, no samples are drawn."""
    samples: int = 500
    """Samples of each run and sample seed for FID and class accuracy."""
    sample_seeds: str = "0,1"
    """Sample seeds, such as 0 or 0,1."""
    speed: list[str] | None = None
    """NAME=results.json of `flashar benchmark` for a row; may be given several times."""
    threads: int = 1
    """CPU threads; models as small as the demo's are fastest on one."""

    def __post_init__(self) -> None:
        check_least(self, samples=2, threads=1)


@dataclass
class Run:
    """One model of a row."""

    checkpoint: str
    pretraining: str
    """Which pre-trained model it is, or comes from: a checkpoint."""
    adaptation: str
    """Its seed as an adaptation; "" = it starts from no weights, or does not say so."""
    tokens: list[int | None]
    """Codes it was trained on: before, and in its own run; None = not known."""
    commit: str | None
    """Of the code that trained it, where `flashar sweep` has written it down."""
    nll: np.ndarray = field(init=False)
    """(N,) in nats."""
    quality: dict[str, list[float]] = field(default_factory=dict)
    """"fid" and "accuracy" by sample seed."""


@dataclass
class Row:
    """Runs that differ in seeds alone."""

    name: str
    runs: list[Run]
    plan: str = ""
    steps: int = 0
    speed: dict[str, Any] | None = None

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """Likelihoods by both levels of seeds."""
        return {(run.pretraining, run.adaptation): run.nll for run in self.runs}


def compare(
    *rows: str,
    images: DataOptions,
    asked: CompareOptions,
    compute: PlanOptions = PlanOptions(),
    text: AssetOptions = AssetOptions(),
) -> dict[str, Any]:
    """Compare models on the same held-out images: likelihood, its paired differences, quality of samples, speed.

    Each row is a checkpoint, a run, or a directory of runs that differ in their seeds. Runs say themselves which
    pre-trained model they start from (model.init_from) and with which seed they were adapted: the two levels over
    which standard errors are taken, beside the images. Differences from the reference row are paired image by image,
    and run by run where both rows have the same seeds. Writes compare.md, compare.json (every run, commit and
    version) and compare.png (intervals of 95 %). The formulas are in docs/evaluation.md.

    Example:
        flashar compare runs/demo/raster runs/demo/flashar --data data/digits --out runs/demo/compare
        flashar compare paper=runs/ablations/digits/paper average=runs/ablations/digits/average --data data/digits
          --classifier runs/demo/classifier --out compare/

    Args:
        rows: checkpoint, run or directory of runs, as PATH or NAME=PATH.
    """
    import torch

    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge
    from flashar_pl.metrics.classifier import ClassifierFeatures

    target, seeds = require_new(asked.out, "comparison"), parse_classes(asked.sample_seeds, "sample_seeds")
    require_pyplot()
    torch.set_num_threads(asked.threads)
    found = {row.name: row for row in find_rows(list(rows))}
    reference = found.get(asked.reference or next(iter(found)))
    if reference is None:
        raise ValueError(f"--reference is {asked.reference!r}; {closest(str(asked.reference), found)}")
    speeds = read_speeds(asked.speed or [], list(found))
    manifest = Manifest.load(images.data)
    manifest.shards(images.split)
    judge = None if asked.classifier is None else Judge.build(ClassifierFeatures.load(asked.classifier), manifest)
    for row in found.values():
        measure(row, manifest, images, judge, asked, compute, text)
        if row.name in speeds:
            row.speed = _fastest(row, speeds[row.name])
    result = {
        "reference": reference.name,
        "rows": {name: describe(row, reference) for name, row in found.items()},
        "split": images.split,
        "images": len(reference.runs[0].nll),
        "data": {"path": images.data, "name": manifest.name, "fingerprint": manifest.fingerprint(images.split)},
        "samples": None if judge is None else {"number": asked.samples, "seeds": seeds, "network": asked.classifier},
        "versions": versions(),
    }
    page = markdown(result)
    with new_directory(target, "comparison") as folder:
        write_text(folder / "compare.md", page)
        write_json(folder / "compare.json", result)
        draw(result, folder / "compare.png")
    print(f"{page}\nwrote {target}/: compare.md, compare.json, compare.png")
    return result


def measure(
    row: Row, manifest: Manifest, images: DataOptions, judge: Judge | None, asked: CompareOptions,
    compute: PlanOptions, text: AssetOptions,
) -> None:  # fmt: skip
    """Fill in what a row's runs make of the images, and what a judge makes of their samples."""
    from flashar_pl.evaluate.quality import sample_quality

    seeds, grid = parse_classes(asked.sample_seeds, "sample_seeds"), manifest.grid
    for run in row.runs:
        source, row.plan, nll = likelihoods(manifest, images, ModelOptions(run.checkpoint), compute, text)
        run.nll, row.steps = nll.numpy(), source.model.make_plan(row.plan, *grid).n_steps
        if judge is not None:
            drawn = conditions_of(manifest, caption_encoder(source, manifest, text.assets))
            run.quality, _ = sample_quality(source.model, row.plan, grid, judge, drawn, asked.samples, seeds)


# --- runs -------------------------------------------------------------------------------------------------------------


def find_rows(words: list[str]) -> list[Row]:
    """Rows with their runs. ValueError for a name given twice, or a place without any checkpoint."""
    if len(words) < 2:
        raise ValueError("name two rows or more, such as runs/demo/raster runs/demo/flashar.")
    rows: list[Row] = []
    for word in words:
        name, equals, place = word.partition("=")
        path = Path(place if equals else word).expanduser()
        name = name if equals else path.name
        if name in [row.name for row in rows]:
            raise ValueError(f"two rows are called {name}; expected names of their own, such as {name}2={path}.")
        rows.append(Row(name, [read_run(checkpoint) for checkpoint in checkpoints_of(path)]))
        keys = [(run.pretraining, run.adaptation) for run in rows[-1].runs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(
                f"row {name} holds {keys.count(twice[0])} runs with seed {twice[0][1] or '-'} from {twice[0][0]}; a "
                "row's runs differ in their seeds. Name the others as rows of their own."
            )
    return rows


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoint that a path is, that a run keeps, or those of the runs inside. ValueError where there is none."""
    runs = [path] if (path / "checkpoints").is_dir() else sorted(p.parent for p in path.glob("*/checkpoints"))
    if not runs:
        if not path.exists():
            raise ValueError(f"no {path}; expected a checkpoint, a run, or a directory of runs.")
        return [path]
    found = []
    for run in runs:
        kept = [run / "checkpoints" / name for name in KEPT if (run / "checkpoints" / name).exists()]
        if not kept:
            raise ValueError(f"{run} has no {' or '.join(KEPT)}; let it finish, or name one of its checkpoints.")
        found.append(kept[0])
    return found


def read_run(path: Path) -> Run:
    """What a checkpoint says of its seeds and its training."""
    from flashar_pl.training.stored_config import own_config

    settings, own = _settings(path)
    start = settings.get("model.init_from")
    marker = path.parent.parent / "sweep.json"
    commit = read_field(marker, "versions", dict).get("commit") if marker.is_file() else None
    if not isinstance(start, str):
        return Run(str(path), str(path.resolve()), "", [None if own is None else 0, own], commit)
    own_start = flatten(own_config(str(path)) or {}).get("model.init_from")
    known = start == own_start and Path(start).exists()  # no path that a stranger's file names is opened
    before = _settings(Path(start))[1] if known else None
    return Run(str(path), str(Path(start).resolve()), str(settings.get("seed_everything")), [before, own], commit)


def _settings(path: Path) -> tuple[dict[str, Any], int | None]:
    """The flat configuration of a training run's checkpoint, and the codes it was trained on; {} and None of others."""
    from flashar_pl.checkpoints.runs import RunCheckpoint
    from flashar_pl.training.stored_config import read_config

    try:
        content = RunCheckpoint(path)
    except ValueError:  # official weights and such; `open_checkpoint` says what is wrong with others
        return {}, None
    settings = flatten(read_config(str(path)))
    batch = settings.get("data.batch_size", settings.get("data.init_args.batch_size"))
    grid, step = content.description.grid, content.content.get("global_step")
    if not (isinstance(batch, int) and isinstance(step, int) and grid):
        return settings, None
    return settings, step * batch * (settings.get("trainer.accumulate_grad_batches") or 1) * grid[0] * grid[1]


def read_speeds(words: list[str], names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the benchmark of each named row."""
    found = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--speed is {word!r}; expected NAME=results.json of a row: {', '.join(names)}.")
        found[name] = read_field(place, "rows", list)
        if not all(isinstance(row, dict) and _is_speed(row) for row in found[name]):
            raise ValueError(f"--speed {place} has other rows than results.json of `flashar benchmark --out`.")
    return found


def _is_speed(row: dict[str, Any]) -> bool:
    """Whether it has what is shown of a row, numbers where numbers are compared."""
    numbers = all(isinstance(row.get(name), int | float) for name in ("batch", "seconds", *SPEED[:2]))
    return numbers and row.keys() >= {"plan", *SPEED}


# --- results ----------------------------------------------------------------------------------------------------------


def _fastest(row: Row, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest row of a benchmark with the plan, one image at a time. ValueError where it has none."""
    own = [each for each in measured if each["plan"] == row.plan and each["batch"] == 1]
    if not own:
        raise ValueError(f"the benchmark of row {row.name} has no {row.plan} row of batch size 1; measure it.")
    best = min(own, key=lambda each: each["seconds"])
    return {name: best[name] for name in SPEED}


def describe(row: Row, reference: Row) -> dict[str, Any]:
    """Everything known of a row as plain values."""
    from flashar_pl.metrics.intervals import difference, nested

    own, apart = nested(row.values()), None
    if row is not reference:
        found, paired = difference(row.values(), reference.values())
        apart = found.estimate.plain() | {"paired": paired, "levels": found.levels}
    return {
        "plan": row.plan,
        "steps": row.steps,
        "nll": own.estimate.plain() | {"levels": own.levels},
        "difference": apart,
        "quality": {name: _spread([run.quality.get(name, []) for run in row.runs]) for name in ("fid", "accuracy")},
        "speed": row.speed,
        "tokens": row.runs[0].tokens,
        "runs": [
            {name: getattr(run, name) for name in ("checkpoint", "pretraining", "adaptation", "tokens", "commit")}
            | {"nll": float(run.nll.mean()), **run.quality}
            for run in row.runs
        ],
    }


def _spread(runs: list[list[float]]) -> dict[str, float | None] | None:
    """Mean over all samples sets, standard deviation over the sample seeds of one run (pooled), and over runs."""
    if not all(runs):
        return None
    within = [stdev(own) ** 2 for own in runs if len(own) > 1]
    return {
        "mean": fmean(value for own in runs for value in own),
        "sample_seeds": fmean(within) ** 0.5 if within else None,
        "runs": stdev([fmean(own) for own in runs]) if len(runs) > 1 else None,
    }
