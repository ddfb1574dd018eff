"""`flashar report run`: what training runs did, in curves, numbers and checks, with samples of the result."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashar_pl.commands.compare_runs import side_by_side
from flashar_pl.commands.plot import Curve, draw_curves, find_runs, read_scalars, require_pyplot
from flashar_pl.console import versions
from flashar_pl.files import new_directory, require_new, write_json

ROWS = 16
"""Rows of the loss table; the JSON has every point."""
COLUMNS = ("train/loss", "train/fused", "train/horizontal", "train/vertical", "val/nll", "val/gate_mean")
MARGIN = 0.02
"""A mean gate this near to 0 or 1 ignores one head."""


PICTURES, SHEET = ("samples", "gate"), "samples.png"
FUSED_STEPS = 200
"""Fewer steps say nothing about which of fused and single losses is lower."""
HEADS = ("train/fused", "train/horizontal", "train/vertical")


@dataclass(frozen=True)
class Check:
    """One thing to watch, found in the curves."""

    text: str
    met: bool


def report_run(*runs: str, out: str, samples: str | None = None) -> dict[str, Any]:
    """Report on training runs: loss curves, validation, stages, speed, and what looks wrong.

    Several runs also get one table of their results and of the settings in which they differ.
    Writes a new directory with report.md, report.json (every logged point), curves.png and, where there are any,
    samples.png and the newest validation pictures. Reads TensorBoard event files only, so a run that is still going,
    was killed or was continued can be reported on; where a step was trained twice, the later values count. For a
    table of raster, FlashAR and training-free decoding of class-conditional models see `flashar report`.

    Example:
        flashar report run runs/emu35_34b --samples pictures --out report

    Args:
        runs: run directories of flashar fit; of a directory of runs, all runs inside are reported.
        out: directory to make; it must not exist.
        samples: directory that flashar generate wrote from the result, shown with its prompts or classes.
    """
    target = require_new(out, "report")
    require_pyplot()
    drawn = None if samples is None else read_samples(samples)
    places = find_runs(list(runs))
    curves = {name: without_heads(read_scalars(place)) for name, place in places.items()}
    for name, place in places.items():
        if not curves[name].get("train/loss", ([], []))[0]:
            raise ValueError(f"{place} has logged no training loss yet; expected the directory of a `flashar fit`.")
    values: dict[str, Any] = {
        "command": "report run",
        "runs": {name: run_facts(places[name], found) for name, found in curves.items()},
        "curves": {n: {tag: {"step": c[0], "value": c[1]} for tag, c in found.items()} for n, found in curves.items()},
        "samples": drawn,
        "versions": versions(),
    }
    with new_directory(target, "report") as folder:
        draw_curves(curves, folder / "curves.png")
        pictures = copy_pictures(folder, places, samples)
        text = markdown(values, curves, pictures)
        (folder / "report.md").write_text(text, encoding="utf-8")
        write_json(folder / "report.json", values)
    print(text)
    print(f"wrote {target}/: {', '.join(['report.md', 'report.json', 'curves.png', *pictures])}")
    return values


def read_samples(directory: str) -> dict[str, Any]:
    """The settings.json that `flashar generate` left in a directory. Raises ValueError if there is none."""
    file = Path(directory) / "settings.json"
    if not file.is_file():
        raise ValueError(f"no settings.json in {directory}; expected a directory that flashar generate wrote.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("command") != "generate":
        raise ValueError(f"{file} was not written by flashar generate; expected one of its directories.")
    return values


# --- facts ----------------------------------------------------------------------------------------------------------


def run_facts(place: Path, curves: dict[str, Curve]) -> dict[str, Any]:
    """Numbers of one run. Steps are finished optimiser steps: what Lightning logs at s is of step s + 1. Losses are
    means over the first and the last fifth of the points. The switch of stages lies between two logged steps."""
    steps, losses = curves["train/loss"]
    stages = dict(zip(*curves.get("train/stage", ([], [])), strict=True))
    first, second = ([step for step, stage in stages.items() if stage == number] for number in (1, 2))
    head, tail = mean_ends(losses)
    facts: dict[str, Any] = {
        "directory": str(place),
        "fits": len(list(place.glob("events.out.tfevents.*"))),
        "steps": steps[-1] + 1,
        "second_stage_after": [max(first) + 1, min(second)] if first and second else None,
        "first_loss": head,
        "last_loss": tail,
        "not_finite": sum(not math.isfinite(loss) for loss in losses),
    }
    if "val/nll" in curves:
        at, nll = curves["val/nll"]
        best = min(range(len(nll)), key=nll.__getitem__)
        facts |= {"best_nll": nll[best], "best_nll_at_step": at[best] + 1, "last_nll": nll[-1]}
    if "train/tokens_per_second" in curves:
        facts["tokens_per_second"] = statistics.median(curves["train/tokens_per_second"][1])
    facts["checks"] = [{"text": check.text, "met": check.met} for check in checks(curves)]
    return facts


def checks(curves: dict[str, Curve]) -> list[Check]:
    """What docs/training.md says to watch, as far as the curves hold it."""
    losses = curves["train/loss"][1]
    stages = curves.get("train/stage", ([], []))
    bad = sum(not math.isfinite(loss) for loss in losses)
    found = [Check("every training loss is a number" if not bad else f"{bad} training losses are no numbers", not bad)]
    head, tail = mean_ends(losses)
    found.append(Check(f"train/loss falls: {head:.4g} at the start, {tail:.4g} at the end", tail < head))
    if "train/vertical" in curves:
        first = {step for step, stage in zip(*stages, strict=True) if stage == 1}
        vertical = [value for step, value in zip(*curves["train/vertical"], strict=True) if step in first]
        if len(vertical) > 1:
            head, tail = mean_ends(vertical)
            found.append(Check(f"train/vertical falls in stage 1: {head:.4g} to {tail:.4g}", tail < head))
    heads = [name for name in ("train/horizontal", "train/vertical") if name in curves]
    if len(heads) == 2 and "train/fused" in curves and curves["train/loss"][0][-1] + 1 >= FUSED_STEPS:
        ends = {name: mean_ends(curves[name][1])[1] for name in (*heads, "train/fused")}
        below = ends["train/fused"] <= min(ends[name] for name in heads)
        text = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in ends.items())
        found.append(Check(f"train/fused ends below both heads: {text}", below))
    if "val/gate_mean" in curves:
        gate = curves["val/gate_mean"][1][-1]
        found.append(Check(f"val/gate_mean {gate:.3f} lets both heads speak", MARGIN < gate < 1 - MARGIN))
    if len(curves.get("val/nll", ([], []))[1]) > 1:
        nll = curves["val/nll"][1]
        found.append(
            Check(f"val/nll ends near its best: {nll[-1]:.4g}, best {min(nll):.4g}", nll[-1] <= 1.02 * min(nll))
        )
    return found


def without_heads(curves: dict[str, Curve]) -> dict[str, Curve]:
    """The curves; of a raster run, whose vertical loss is always 0, without those of single heads."""
    if any(curves.get("train/vertical", ([], []))[1]):
        return curves
    return {tag: curve for tag, curve in curves.items() if tag not in HEADS}


def mean_ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last fifth, at least one value each."""
    n = max(1, len(values) // 5)
    return statistics.mean(values[:n]), statistics.mean(values[-n:])


# --- text and pictures ----------------------------------------------------------------------------------------------


def copy_pictures(folder: Path, places: dict[str, Path], samples: str | None) -> list[str]:
    """Copy the sheet of samples and the newest validation pictures; names of what was copied."""
    found = [] if samples is None else [(SHEET, Path(samples) / "grid.png")]
    for number, place in enumerate(places.values()):
        for kind in PICTURES:
            newest = sorted((place / kind).glob("val_step_*.png"))[-1:]
            found += [(picture_name(kind, number, len(places)), path) for path in newest]
    there = [(name, path) for name, path in found if path.is_file()]
    for name, path in there:
        shutil.copyfile(path, folder / name)
    return [name for name, _ in there]


def picture_name(kind: str, number: int, runs: int) -> str:
    """Of the newest validation picture of run `number`."""
    return f"val_{kind}.png" if runs == 1 else f"val_{kind}_{number}.png"


def markdown(values: dict[str, Any], curves: dict[str, dict[str, Curve]], pictures: list[str]) -> str:
    """The report as text."""
    parts = ["# Training report", "![Curves](curves.png)"]
    if len(curves) > 1:
        parts += ["## Side by side", side_by_side(values["runs"], curves)]
    for number, (name, facts) in enumerate(values["runs"].items()):
        parts += [f"## {name}", _facts(facts), _looks(facts), _table(curves[name])]
        own = [picture_name(kind, number, len(curves)) for kind in PICTURES]
        parts += [f"![{picture}]({picture})" for picture in own if picture in pictures]
    if values["samples"] is not None:
        parts.append(_samples(values["samples"]))
        parts += [f"![{SHEET}]({SHEET})"] if SHEET in pictures else []
    return "\n\n".join(parts) + "\n"


def _facts(facts: dict[str, Any]) -> str:
    switch = facts["second_stage_after"]
    lines = [
        f"- {facts['steps']:,} steps logged, in {facts['fits']} fit{'s' if facts['fits'] > 1 else ''} "
        f"({facts['directory']}); " + _switch(switch),
        f"- training loss {facts['first_loss']:.4g} in the first fifth, {facts['last_loss']:.4g} in the last",
    ]
    if "best_nll" in facts:
        lines.append(
            f"- held-out NLL, nats per image: {facts['last_nll']:.4g}; best {facts['best_nll']:.4g} at step "
            f"{facts['best_nll_at_step']:,}"
        )
    if "tokens_per_second" in facts:
        lines.append(f"- {facts['tokens_per_second']:,.0f} codes per second in training (median)")
    return "\n".join(lines)


def _switch(between: list[int] | None) -> str:
    """When stage 2 began, as exactly as steps were logged."""
    if between is None:
        return "one stage"
    low, high = between
    return f"stage 2 after {high:,} steps" if low == high else f"stage 2 after {low:,} to {high:,} steps"


def _looks(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {'as expected' if check['met'] else 'LOOK'}: {check['text']}" for check in facts["checks"])


def _table(curves: dict[str, Curve]) -> str:
    """The loss curve as about `ROWS` lines, each the last point logged up to its step."""
    steps = curves["train/loss"][0]
    chosen = sorted({steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)} if steps else set())
    columns = [tag for tag in COLUMNS if tag in curves]
    lines = ["| step | " + " | ".join(columns) + " |", "|" + "---:|" * (len(columns) + 1)]
    before = -1
    for step in chosen:
        cells = []
        for tag in columns:
            inside = [value for at, value in zip(*curves[tag], strict=True) if before < at <= step]
            cells.append(f"{inside[-1]:.4f}" if inside else " ")
        lines.append(f"| {step + 1} | " + " | ".join(cells) + " |")
        before = step
    return "\n".join(lines)


def _samples(values: dict[str, Any]) -> str:
    settings, images = values["settings"], values["images"]
    rows: dict[str, str] = {image["label"]: image.get("prompt", image["label"]) for image in images}
    lines = [f"## Samples of {values['checkpoint']['path']}", ""]
    lines.append(
        f"{len(images)} images, {settings['plan']} plan, guidance {settings['cfg_scale']:g}, seeds from "
        f"{settings['seed']}; row by row:"
    )
    lines += ["", *(f"- {prompt}" for prompt in rows.values())]
    return "\n".join(lines)
