"""The tables and the picture of `flashar compare`, from what its JSON file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashar_pl.commands.plot import require_pyplot
from flashar_pl.console import table


def markdown(result: dict[str, Any]) -> str:
    """The tables with their notes."""
    rows, reference = result["rows"], result["reference"]
    head = [
        "",
        "seeds",
        "steps",
        "NLL, nats/image",
        f"minus {reference}",
        "95 % interval",
        "paired",
        "codes trained on",
    ]
    optional = {
        "FID": lambda row: _plus(row["quality"]["fid"], 1),
        "accuracy": lambda row: _plus(row["quality"]["accuracy"], 3),
        "ms/image": lambda row: "-" if row["speed"] is None else f"{row['speed']['ms_per_image']:.4g}",
        "img/s": lambda row: "-" if row["speed"] is None else f"{row['speed']['images_per_s']:.4g}",
    }
    shown = {name: cell for name, cell in optional.items() if any(cell(row) != "-" for row in rows.values())}
    lines = [[name, *_cells(row), *(cell(row) for cell in shown.values())] for name, row in rows.items()]
    spread = [[name, *_spread_cells(row)] for name, row in rows.items() if row["difference"] is not None]
    notes = [
        f"- {result['images']} {result['split']} images of {result['data']['name']}. Seeds: pre-trained models x "
        "adaptations of each; ± is the standard error over images and both levels of seeds (where there is one seed of "
        "a level, not over that level).",
        "- Paired: by run (same seeds on both sides), by pre-trained model, or by image alone.",
        "- Codes trained on: before + in the adaptation, of one model.",
    ]
    if result["samples"] is not None:
        notes.append(
            f"- FID, accuracy: {result['samples']['number']} samples for each run and sample seed, ± standard "
            "deviation over sample seeds; such small sets are biased upwards, compare rows of this table only."
        )
    second = ["difference", "over pre-training seeds", "over adaptation seeds", "standard error from images"]
    return "\n".join([
        f"# Comparison with {reference}", "", table([*head, *shown], lines), "",
        "Standard deviations of the differences, in nats:", "", table(second, spread), "", *notes, "",
    ])  # fmt: skip


def _cells(row: dict[str, Any]) -> Iterator[str]:
    levels, nll, apart = row["nll"]["levels"], row["nll"], row["difference"]
    outer, inner = levels["pretraining"]["seeds"], levels["adaptation"]["seeds"]
    yield f"{outer} x {inner / outer:.3g}" if inner else str(outer)
    yield str(row["steps"])
    yield f"{nll['value']:.2f}" + ("" if nll["standard_error"] is None else f" ± {nll['standard_error']:.2f}")
    if apart is None:
        yield from ("-", "-", "-")
    else:
        interval = apart["interval_95"]
        yield _signed(apart, "+")
        yield "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        yield apart["paired"]
    yield " + ".join("?" if n is None else f"{n / 1e6:.3g} M" for n in row["tokens"])


def _signed(estimate: dict[str, Any], sign: str) -> str:
    error = estimate["standard_error"]
    return f"{estimate['value']:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def _spread_cells(row: dict[str, Any]) -> list[str]:
    levels = row["difference"]["levels"]
    found = [levels.get(name, {}).get("standard_deviation") for name in ("pretraining", "adaptation")]
    found.append(levels.get("images", {}).get("standard_error"))
    return ["-" if value is None else f"{value:.3f}" for value in found]


def _plus(spread: dict[str, float | None] | None, digits: int) -> str:
    if spread is None:
        return "-"
    own = spread["sample_seeds"]
    return f"{spread['mean']:.{digits}f}" + ("" if own is None else f" ± {own:.{digits}f}")


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each quantity, a line for each row, with bars of its interval or spread."""
    pyplot, rows = require_pyplot(), result["rows"]

    def interval(estimate: dict[str, Any] | None) -> tuple[float, float] | None:
        if estimate is None:
            return None
        low, high = estimate["interval_95"] or (estimate["value"], estimate["value"])
        return estimate["value"], (high - low) / 2

    def spread(quality: dict[str, float] | None) -> tuple[float, float] | None:
        return None if quality is None else (quality["mean"], quality["sample_seeds"] or 0.0)

    def speed(measured: dict[str, Any] | None) -> tuple[float, float] | None:
        return None if measured is None else (measured["images_per_s"], 0.0)

    panels: dict[str, Callable[[dict[str, Any]], tuple[float, float] | None]] = {
        "NLL, nats per image (95 %)": lambda row: interval(row["nll"]),
        f"NLL minus {result['reference']} (95 %)": lambda row: interval(row["difference"]),
        "FID (± sd over sample seeds)": lambda row: spread(row["quality"]["fid"]),
        "images per second": lambda row: speed(row["speed"]),
    }
    shown = {title: points for title, cell in panels.items() if any(points := [cell(row) for row in rows.values()])}
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(4.2 * len(shown) + 1, 0.4 * len(rows) + 1.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, points) in zip(axes[0], shown.items(), strict=True):
        for place, point in enumerate(points):
            if point is not None:
                axis.errorbar(point[0], place, xerr=point[1] or None, fmt="o", color=f"C{place % 10}", capsize=3)
        if "minus" in title:
            axis.axvline(0, color="0.5", linewidth=1, linestyle="--")
        axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
