"""`flashar plot`: convergence curves from TensorBoard event files."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashar_pl.files import require_new

Curve = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Panel:
    """One quantity."""

    title: str
    unit: str
    tags: tuple[str, ...]
    """Tags or, ending in "/", prefixes of tags; the first is drawn solid, the others dashed, dotted, ..."""


PANELS = (
    Panel("Training loss (Eq. 9 + 10)", "nats per code", ("train/loss",)),
    Panel("Held-out negative log-likelihood", "nats per image", ("val/nll",)),
    Panel("Fréchet distance of samples", "FID", ("val/fid",)),
    Panel("Class accuracy of samples", "share", ("val/accuracy",)),
    Panel("Mean gate (weight of the horizontal head)", "g", ("val/gate_mean",)),
    Panel("Learning rate", "rate", ("lr/",)),
)
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (1, 3)))


def plot(*runs: str, out: str = "convergence.png", width: float = 13.0) -> Path:
    """Draw convergence curves of one or more runs: one panel per quantity, one colour per run.

    Quantities: training loss, held-out NLL, FID, class accuracy of samples, mean gate, learning rate of each role.
    Every logged point is drawn. Quantities that no run has are left out.

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
    curves = {name: read_scalars(path) for name, path in find_runs(list(runs)).items()}
    part = target.with_name(f".{os.getpid()}.{target.name}")
    panels = draw_curves(curves, part, width)
    if not panels:
        raise ValueError(f"the event files of {', '.join(runs)} hold none of the known quantities, such as train/loss.")
    part.replace(target)
    print(f"{panels} panels of {len(curves)} runs: {target}")
    return target


def draw_curves(curves: dict[str, dict[str, Curve]], path: Path, width: float = 13.0) -> int:
    """Draw every panel that a run has a quantity for: run -> tag -> curve. Returns their number; with none, no file."""
    panels = [panel for panel in PANELS if any(_matching(panel, found) for found in curves.values())]
    if not panels:
        return 0
    pyplot = require_pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, 3.4 * rows), squeeze=False, layout="constrained")
    colours = run_colours(list(curves))
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, curves, colours)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    columns = max(1, int(10 * width / (max(len(name) for name in curves) + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(curves)), fontsize=9)
    figure.set_figheight(figure.get_figheight() + 0.2 * (1 + -(-len(curves) // columns)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return len(panels)


def require_pyplot() -> Any:
    """matplotlib.pyplot on a canvas without a window. Raises ImportError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flashar-pl[demo]'") from error
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

    events = EventAccumulator(str(directory), size_guidance={SCALARS: 0})  # 0 = every point
    events.Reload()
    curves: dict[str, Curve] = {}
    for tag in events.Tags()["scalars"]:
        points = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = sorted(points)
        curves[tag] = steps, [points[step] for step in steps]
    return curves


def _matching(panel: Panel, curves: dict[str, Curve]) -> list[str]:
    return [
        tag
        for tag in sorted(curves)
        for wanted in panel.tags
        if tag == wanted or (wanted[-1] == "/" and tag.startswith(wanted))
    ]


def run_colours(names: list[str]) -> dict[str, Any]:
    """A colour for each run: matplotlib's ten, or, for more runs, evenly spaced ones."""
    from matplotlib import colormaps

    if len(names) <= 10:
        return {name: f"C{number}" for number, name in enumerate(names)}
    return {name: colormaps["turbo"](number / (len(names) - 1)) for number, name in enumerate(names)}


def _draw(axis: Any, panel: Panel, curves: dict[str, dict[str, Curve]], colours: dict[str, Any]) -> None:
    """One panel: a colour per run, a line style per tag. Step s of Lightning is the end of optimiser step s + 1."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    tags = sorted({tag for found in curves.values() for tag in _matching(panel, found)})
    styles = dict(zip(tags, itertools.cycle(STYLES)))
    for run, found in curves.items():
        for tag in _matching(panel, found):
            steps, values = found[tag]
            few = len(steps) <= 12
            axis.plot(
                [step + 1 for step in steps],
                values,
                color=colours[run],
                linestyle=styles[tag],
                marker="o" if few else None,
                markersize=3.5,
                linewidth=1.4,
            )
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel(panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(tags) > 1:
        handles = [Line2D([], [], color="0.3", linestyle=styles[tag], label=tag.split("/")[-1]) for tag in tags]
        axis.legend(handles=handles, fontsize=8, handlelength=3.5)
