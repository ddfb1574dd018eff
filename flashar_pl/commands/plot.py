"""`flashar plot`: convergence curves from TensorBoard event files, and runs side by side in a table."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashar_pl.console import needing, table
from flashar_pl.files import replacing, require_new
from flashar_pl.text_files import read_yaml

Curve = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Panel:
    """One quantity."""

    title: str
    unit: str
    pattern: str
    """Of its tags; the first is drawn solid, the others dashed, dotted, ..."""

    def tags(self, curves: Iterable[str]) -> list[str]:
        """Those of some curves that belong here."""
        return fnmatch.filter(sorted(curves), self.pattern)


PANELS = (
    Panel("Training loss (Eq. 9 + 10)", "nats per code", "train/loss"),
    Panel("Held-out negative log-likelihood", "nats per image", "val/nll"),
    Panel("Fréchet distance of samples", "FID", "val/fid"),
    Panel("Class accuracy of samples", "share", "val/accuracy"),
    Panel("Mean gate (weight of the horizontal head)", "g", "val/gate_mean"),
    Panel("Learning rate", "rate", "lr/*"),
)
RESULTS = ("val/nll", "val/fid", "val/accuracy", "val/gate_mean")
COMPARED = (
    *("seed_everything", "model.", "data.", "trainer.max_steps", "trainer.max_epochs", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "trainer.strategy."),
)
NOT_COMPARED = ("model.validation.samples", "model.validation.features", "model.validation.grid_images")
"""Beginnings of the settings that make a result, and of those among them that only look at it."""
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (1, 3)))


def plot(*runs: str, out: str = "convergence.png", width: float = 13.0) -> Path:
    """Draw convergence curves of one or more runs: one panel per quantity, one colour per run.

    Quantities: training loss, held-out NLL, FID, class accuracy of samples, mean gate, learning rate of each role.
    Every logged point is drawn. Quantities that no run has are left out. Prints a table of the runs: their steps, their
    newest results, and the settings in which they differ. Reads event files and config.yaml only, so a run may still
    be going.

    Example:
        flashar plot runs/demo/raster runs/demo/flashar --out convergence.png

    Args:
        runs: run directories with TensorBoard event files; of a directory of runs, all runs inside are drawn.
        out: PNG, PDF or SVG file to write; it must not exist.
        width: of the figure in inches.
    """
    require_pyplot()
    target = require_new(out, "plot")
    if target.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out is {out}; expected a name ending in .png, .pdf or .svg.")
    places = find_runs(list(runs))
    curves = {name: read_scalars(path) for name, path in places.items()}
    panels = [panel for panel in PANELS if any(map(panel.tags, curves.values()))]
    if not panels:
        raise ValueError(f"the event files of {', '.join(runs)} hold none of the known quantities, such as train/loss.")
    with replacing(target) as part:
        draw_curves(curves, panels, part, target.suffix[1:].lower(), width)
    print(side_by_side(curves, {name: read_settings(path / "config.yaml") for name, path in places.items()}))
    print(f"{len(panels)} panels of {len(curves)} runs: {target}")
    return target


def side_by_side(curves: dict[str, dict[str, Curve]], settings: dict[str, dict[str, Any]]) -> str:
    """A row for each run: its steps, the newest value of each result, and what differs in its settings."""
    keys = sorted(set().union(*settings.values()))
    keys = [key for key in keys if key.startswith(COMPARED) and not key.startswith(NOT_COMPARED)]
    keys = [key for key in keys if len({str(found.get(key)) for found in settings.values()}) > 1]
    results = [tag for tag in RESULTS if any(tag in found for found in curves.values())]
    rows = []
    for name, found in curves.items():
        steps = found.get("train/loss", ([], []))[0]
        newest = [f"{found[tag][1][-1]:.4g}" if tag in found else "-" for tag in results]
        own = [str(settings[name].get(key, "-")) for key in keys]
        rows.append([name, f"{steps[-1] + 1:,}" if steps else "-", *newest, *own])
    short = [key.removeprefix("model.").removeprefix("trainer.") for key in keys]
    return table(["run", "steps", *results, *short], rows)


def read_settings(file: Path) -> dict[str, Any]:
    """config.yaml of a run with dotted keys, without empty values; {} where there is none."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    values = read_yaml(file) if file.is_file() else None
    return {key: value for key, value in flat(values if isinstance(values, dict) else {}).items() if value is not None}


def draw_curves(curves: dict[str, dict[str, Curve]], panels: list[Panel], path: Path, kind: str, width: float) -> None:
    """Draw the panels of run -> tag -> curve as a file of a kind such as png."""
    pyplot = require_pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, 3.4 * rows), squeeze=False, layout="constrained")
    palette = pyplot.get_cmap("tab10") if len(curves) <= 10 else pyplot.get_cmap("turbo", len(curves))
    colours = {name: palette(number) for number, name in enumerate(curves)}
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, curves, colours)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    columns = max(1, int(10 * width / (max(len(name) for name in curves) + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(curves)), fontsize=9)
    figure.set_figheight(figure.get_figheight() + 0.2 * (1 + -(-len(curves) // columns)))
    figure.savefig(path, dpi=130, format=kind)
    pyplot.close(figure)


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


def _draw(axis: Any, panel: Panel, curves: dict[str, dict[str, Curve]], colours: dict[str, Any]) -> None:
    """One panel: a colour per run, a line style per tag. Step s of Lightning is the end of optimiser step s + 1."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    tags = panel.tags(set().union(*curves.values()))
    styles = dict(zip(tags, itertools.cycle(STYLES)))
    for run, found in curves.items():
        for tag in panel.tags(found):
            steps, values = [step + 1 for step in found[tag][0]], found[tag][1]
            marker = "o" if len(steps) <= 12 else None
            axis.plot(steps, values, color=colours[run], linestyle=styles[tag], marker=marker, markersize=3.5)
    axis.set(title=panel.title, xlabel="optimiser step", ylabel=panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(tags) > 1:
        handles = [Line2D([], [], color="0.3", linestyle=styles[tag], label=tag.split("/")[-1]) for tag in tags]
        axis.legend(handles=handles, fontsize=8, handlelength=3.5)
