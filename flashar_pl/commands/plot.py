"""`flashar plot`: convergence curves from TensorBoard event files, and runs side by side in a table."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from flashar_pl.console import needing, table
from flashar_pl.evaluate.options import MEASURED
from flashar_pl.files import replacing, require_new
from flashar_pl.text_files import flatten, read_field, read_yaml

Axis = Literal["step", "epoch", "gpu-hours"]
AXES = {"epoch": "train/epochs", "gpu-hours": "train/device_hours"}
"""Curves of a run that say where on an axis a step is."""
Curve = tuple[list[int], list[float]]
"""Steps (completed optimiser steps; 0 = before the first) and values."""


PlacedCurve = tuple[list[int], list[float], list[float]]
"""Steps, where they are on the axis, values."""


@dataclass(frozen=True)
class Placed:
    """A run on an axis."""

    curves: dict[str, PlacedCurve]
    switch: list[float]
    """Where stage 2 begins; [] = there is one stage."""


@dataclass(frozen=True)
class Panel:
    """One quantity."""

    title: str
    unit: str
    patterns: tuple[str, ...]
    """Of its tags; the first is drawn solid, the others dashed, dotted, ..."""

    def tags(self, curves: Iterable[str]) -> list[str]:
        """Those of some curves that belong here."""
        names = sorted(curves)
        return [name for pattern in self.patterns for name in fnmatch.filter(names, pattern)]


LOSS = Panel("Training loss", "nats per code", ("train/loss",))
"""Only where no run has the three losses."""
PANELS = (
    Panel("Training losses (Eq. 8 to 10)", "nats per code", ("train/fused", "train/horizontal", "train/vertical")),
    LOSS,
    Panel("Held-out negative log-likelihood", "nats per image", ("val/nll",)),
    Panel("Fréchet distance of samples", "FID", ("val/fid", "measured/fid")),
    Panel("Inception Score of samples", "IS", ("measured/is",)),
    Panel("Class accuracy of samples", "share", ("val/accuracy",)),
    Panel("Mean gate (weight of the horizontal head)", "g", ("val/gate_mean",)),
    Panel("Learning rate", "rate", ("lr/*",)),
)
RESULTS = ("val/nll", "val/fid", "measured/fid", "val/accuracy", "val/gate_mean")
COMPARED = (
    *("seed_everything", "model.", "data.", "trainer.max_steps", "trainer.max_epochs", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "trainer.strategy."),
)
NOT_COMPARED = tuple(f"model.validation.{name}" for name in ("samples", "features", "grid_images", "at_start"))
"""Beginnings of the settings that make a result, and of those among them that only look at it."""
SEEDS = ("seed_everything", "data.seed", "data.init_args.seed")
"""Settings in which runs may differ that are drawn as one band."""
BASELINE: dict[str, Any] = {"color": "0.25", "linestyle": "--", "linewidth": 1}
BEFORE: dict[str, Any] = {"linestyle": "", "marker": "D", "markersize": 6, "fillstyle": "none"}
SWITCH: dict[str, Any] = {"linestyle": ":", "linewidth": 1}
WIDTH = 13.0
"""Of the figure in inches."""
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (1, 3)))


def plot(
    *runs: str,
    out: str = "convergence.png",
    axis: Axis = "step",
    baseline: str | None = None,
    apart: bool = False,
) -> Path:
    """Draw convergence curves of one or more runs: one panel per quantity, one colour per run.

    Quantities: the three training losses, held-out NLL, FID, class accuracy of samples, mean gate, learning rate of
    each role, and what `flashar evaluate --run` has measured. Every logged point is drawn; a validation before the
    first step is a diamond, the switch of stages a dotted line. Runs that differ in their seeds alone are one line,
    their mean, in a band from the lowest to the highest. Quantities that no run has are left out. Prints a table of
    the runs: their steps, their newest results (with the step, where it is not the last), and the settings in which
    they differ. Reads event files, evaluations and config.yaml only, so a run may still be going.

    Example:
        flashar plot runs/demo/raster runs/demo/flashar --out convergence.png
        flashar plot runs/demo/flashar --baseline runs/demo/raster --axis gpu-hours

    Args:
        runs: run directories with TensorBoard event files; of a directory of runs, all runs inside are drawn.
        out: PNG, PDF or SVG file to write; it must not exist.
        axis: step counts optimiser steps, epoch passes over the data, gpu-hours the time of training without
            validations, times the number of devices (of a run on a CPU: of processes).
        baseline: run directory whose last results are drawn as horizontal lines, such as the raster model's; of a
            training loss the mean of its last tenth.
        apart: draw runs that differ in their seeds alone one by one.
    """
    require_pyplot()
    target = require_new(out, "plot")
    if target.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out is {out}; expected a name ending in .png, .pdf or .svg.")
    places = find_runs(list(runs))
    curves = {name: read_curves(path) for name, path in places.items()}
    settings = {name: read_settings(path / "config.yaml") for name, path in places.items()}
    panels = [panel for panel in PANELS if any(map(panel.tags, curves.values()))]
    if LOSS in panels and PANELS[0] in panels:
        panels.remove(LOSS)
    if not panels:
        raise ValueError(f"the event files of {', '.join(runs)} hold none of the known quantities, such as train/loss.")
    levels = {} if baseline is None else read_levels(baseline)
    placed = {name: on_axis(name, found, axis) for name, found in curves.items()}
    lines = {name: [name] for name in curves} if apart else by_seed(settings)
    draw_curves({n: [placed[run] for run in own] for n, own in lines.items()}, panels, levels, axis, target)
    print(side_by_side(curves, settings))
    print(f"{len(panels)} panels of {len(curves)} runs: {target}")
    return target


def by_seed(settings: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Line -> its runs: those whose settings, as far as they make a result, differ in seeds alone."""
    groups: dict[str, list[str]] = {}
    for name, found in settings.items():
        same = {key: value for key, value in found.items() if compared(key) and key not in SEEDS}
        groups.setdefault(str(sorted(same.items(), key=str)) if found else name, []).append(name)
    return {own[0] if len(own) == 1 else f"{own[0]} ({len(own)} seeds)": own for own in groups.values()}


def compared(key: str) -> bool:
    """Whether a setting makes a result."""
    return key.startswith(COMPARED) and not key.startswith(NOT_COMPARED)


def on_axis(name: str, found: dict[str, Curve], axis: Axis) -> Placed:
    """The curves of a run on an axis. Raises ValueError for a run that does not say where its steps are on it."""
    stages = zip(*found.get("train/stage", ([], [])), strict=True)
    switch = [float(step - 1) for step, stage in stages if stage == 2 and step > 1][:1]
    if axis == "step":
        return Placed({tag: (steps, list(map(float, steps)), values) for tag, (steps, values) in found.items()}, switch)
    if AXES[axis] not in found:
        raise ValueError(f"run {name} has no curve {AXES[axis]}, which says where its steps are; expected --axis step.")
    import numpy

    known, there = ([0, *values] for values in found[AXES[axis]])

    def at(step: float) -> float:
        """Between known steps on a straight line, after the last one at the mean rate."""
        if step > known[-1]:
            return there[-1] * step / known[-1]
        return float(numpy.interp(step, known, there))

    moved = {tag: (steps, list(map(at, steps)), values) for tag, (steps, values) in found.items()}
    return Placed(moved, list(map(at, switch)))


def read_levels(baseline: str) -> dict[str, float]:
    """Tag -> what a run has come to. Raises ValueError unless there is exactly one run."""
    places = find_runs([baseline])
    if len(places) != 1:
        raise ValueError(f"--baseline {baseline} holds {len(places)} runs ({', '.join(places)}); expected one of them.")
    [place] = places.values()
    return {
        tag: fmean(values[-max(1, len(values) // 10) :] if tag.startswith("train/") else values[-1:])
        for tag, (_, values) in read_curves(place).items()
    }


def side_by_side(curves: dict[str, dict[str, Curve]], settings: dict[str, dict[str, Any]]) -> str:
    """A row for each run: its steps, the newest value of each result, and what differs in its settings."""
    keys = sorted(set().union(*settings.values()))
    keys = [key for key in keys if compared(key) and len({str(found.get(key)) for found in settings.values()}) > 1]
    results = [tag for tag in RESULTS if any(tag in found for found in curves.values())]
    rows = []
    for name, found in curves.items():
        last, newest = max(steps[-1] for steps, _ in found.values()), []
        for steps, values in (found.get(tag, ([], [])) for tag in results):
            late = f" (step {steps[-1]:,})" if steps and steps[-1] < last else ""
            newest.append(f"{values[-1]:.4g}{late}" if values else "-")
        own = [str(settings[name].get(key, "-")) for key in keys]
        rows.append([name, f"{last:,}", *newest, *own])
    short = [key.removeprefix("model.").removeprefix("trainer.") for key in keys]
    return table(["run", "steps", *results, *short], rows)


def read_settings(file: Path) -> dict[str, Any]:
    """config.yaml of a run with dotted keys, without empty values; {} where there is none."""
    values = read_yaml(file) if file.is_file() else None
    flat = flatten(values if isinstance(values, dict) else {})
    return {key: value for key, value in flat.items() if value is not None and value != {}}


def draw_curves(
    lines: dict[str, list[Placed]], panels: list[Panel], levels: dict[str, float], axis: Axis, path: Path
) -> None:
    """Draw the panels of line -> its runs, and the baseline's levels, as a file."""
    pyplot, columns = require_pyplot(), min(3, len(panels))
    rows = -(-len(panels) // columns)
    palette = pyplot.get_cmap("tab10") if len(lines) <= 10 else pyplot.get_cmap("turbo", len(lines))
    colours = {name: palette(number) for number, name in enumerate(lines)}
    handles = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if levels:
        handles.append(pyplot.Line2D([], [], **BASELINE, label="baseline"))
    if any(steps[:1] == [0] for runs in lines.values() for run in runs for steps, _, _ in run.curves.values()):
        handles.append(pyplot.Line2D([], [], **BEFORE, color="0.3", label="before the first step"))
    if any(run.switch for runs in lines.values() for run in runs):
        handles.append(pyplot.Line2D([], [], **SWITCH, color="0.3", label="stage 2 begins"))
    beside = max(1, int(10 * WIDTH / (max(len(handle.get_label()) for handle in handles) + 6)))
    height = 3.4 * rows + 0.2 * (1 + -(-len(handles) // beside))
    with figure(path, rows, columns, (WIDTH, height)) as axes:
        for place, panel in zip(axes, panels):
            _draw(place, panel, lines, colours, levels)
            place.set_xlabel({"step": "optimiser step", "gpu-hours": "GPU-hours"}.get(axis, axis))
        for place in axes[len(panels) :]:
            place.set_visible(False)
        axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=min(beside, len(handles)), fontsize=9)


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[list[Any]]:
    """Axes, row by row, of a figure of so many inches, whose file is written, complete or not at all, at the end."""
    pyplot = require_pyplot()
    made, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    try:
        yield list(axes.flat)
        with replacing(path) as part:
            made.savefig(part, dpi=130, format=path.suffix[1:].lower())
    finally:
        pyplot.close(made)


def require_pyplot() -> Any:
    """matplotlib.pyplot on a canvas without a window. Raises ValueError where matplotlib is not installed."""
    with needing("a plot", "demo"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def find_runs(given: list[str]) -> dict[str, Path]:
    """Name -> directory with event files, for run directories and directories of runs.

    Raises:
        ValueError: a directory does not exist, or holds no event file at any depth.
    """
    if not given:
        raise ValueError("name at least one run directory, such as runs/demo/flashar.")
    found: dict[str, Path] = {}
    for text in given:
        root = Path(text)
        places = sorted({file.parent for file in root.rglob("events.out.tfevents.*")}) if root.is_dir() else []
        if not places:
            raise ValueError(f"no TensorBoard event files below {root}; expected the directory of a `flashar fit`.")
        for place in places:
            found[str(place)] = place
    common = os.path.commonpath([str(Path(name).parent) for name in found])
    return {os.path.relpath(name, common): place for name, place in found.items()}


def read_curves(run: Path) -> dict[str, Curve]:
    """What a run has logged, and below measured/ what `flashar evaluate --run` has found."""
    curves, file = read_scalars(run), run / MEASURED
    entries = read_field(file, "checkpoints", list) if file.is_file() else []
    for entry in entries:
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        numbers = [entry.get("step"), *metrics.values()] if isinstance(metrics, dict) else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{file} has {str(entry)[:60]} among its checkpoints; measure again, or remove it.")
    for name in sorted({name for entry in entries for name in entry["metrics"]}):
        own = [entry for entry in entries if name in entry["metrics"]]
        curves[f"measured/{name}"] = [e["step"] for e in own], [e["metrics"][name] for e in own]
    return curves


def read_scalars(directory: Path) -> dict[str, Curve]:
    """Every scalar point of the event files of a run: tag -> (steps, values), in the order of the steps.

    A step that was logged twice (a run continued from an earlier checkpoint) keeps its last value.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    # A continued run takes points back that came after its checkpoint, which TensorBoard reports as if it were a fault.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(directory), size_guidance={SCALARS: 0})  # 0 = every point
    events.Reload()
    curves: dict[str, Curve] = {}
    for tag in events.Tags()["scalars"]:
        points = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = sorted(points)
        curves[tag] = steps, [points[step] for step in steps]
    return curves


def _draw(
    axis: Any, panel: Panel, lines: dict[str, list[Placed]], colours: dict[str, Any], levels: dict[str, float]
) -> None:
    """One panel: a colour per line, a line style per tag."""
    from matplotlib.lines import Line2D

    tags = panel.tags({tag for runs in lines.values() for run in runs for tag in run.curves})
    styles = dict(zip(tags, itertools.cycle(STYLES)))
    for name, runs in lines.items():
        for tag in tags:
            _draw_line(axis, [run.curves[tag] for run in runs if tag in run.curves], colours[name], styles[tag])
        for at in {at for run in runs for at in run.switch}:
            axis.axvline(at, **SWITCH, color=colours[name])
    for tag in [tag for tag in tags if tag in levels and not tag.startswith("lr/")]:
        axis.axhline(levels[tag], **BASELINE)
    axis.set(title=panel.title, ylabel=panel.unit)
    axis.grid(alpha=0.3)
    axis.set_xlim(left=0 if axis.get_xlim()[0] > 0 else None)
    if len(tags) > 1:
        handles = [Line2D([], [], color="0.3", linestyle=styles[tag], label=tag) for tag in tags]
        axis.legend(handles=handles, fontsize=8, handlelength=3.5)


def _draw_line(axis: Any, curves: list[PlacedCurve], colour: Any, style: Any) -> None:
    """The mean of some runs over the steps that all have, in a band; step 0 apart, as a diamond."""
    import numpy

    common = sorted(set.intersection(*(set(steps) for steps, _, _ in curves))) if curves else []
    if not common:
        return
    rows = [[(there[i], values[i]) for i in map(steps.index, common)] for steps, there, values in curves]
    at, values = numpy.moveaxis(numpy.array(rows, dtype=float), -1, 0)  # (runs, steps) each
    at, low, middle, high = at.mean(0), values.min(0), values.mean(0), values.max(0)
    after = numpy.array(common) > 0
    marker = "o" if after.sum() <= 12 else None
    axis.plot(at[after], middle[after], color=colour, linestyle=style, marker=marker, markersize=3.5)
    axis.plot(at[~after], middle[~after], color=colour, **BEFORE)
    if len(curves) > 1:
        axis.fill_between(at[after], low[after], high[after], color=colour, alpha=0.2, linewidth=0)
        axis.vlines(at[~after], low[~after], high[~after], color=colour)
