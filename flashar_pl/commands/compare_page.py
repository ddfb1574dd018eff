"""The tables and the picture of `flashar compare`, from what its JSON file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashar_pl.commands.plot import figure
from flashar_pl.console import plus_minus, table


def markdown(result: dict[str, Any]) -> str:
    """The tables with their notes."""
    rows, reference = result["rows"], result["reference"]
    head = ["", "seeds", "steps", "NLL, nats/image", f"minus {reference}", "95 % interval", "paired"]
    optional = {
        "FID": lambda row: _quality(row, "fid", ".1f"),
        "accuracy": lambda row: _quality(row, "accuracy", ".3f"),
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
        f"# Comparison with {reference}", "", table([*head, "codes trained on", *shown], lines), "",
        "Standard deviations of the differences, in nats:", "", table(second, spread), "", *notes, "",
    ])  # fmt: skip


def _cells(row: dict[str, Any]) -> Iterator[str]:
    levels, nll, apart = row["nll"]["levels"], row["nll"], row["difference"]
    outer, inner = levels["pretraining"]["seeds"], levels["adaptation"]["seeds"]
    yield f"{outer} x {inner / outer:.3g}" if inner else str(outer)
    yield str(row["steps"])
    yield plus_minus(nll["value"], nll["standard_error"], ".2f")
    if apart is None:
        yield from ("-", "-", "-")
    else:
        interval = apart["interval_95"]
        yield plus_minus(apart["value"], apart["standard_error"], "+.2f")
        yield "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        yield apart["paired"]
    yield " + ".join("?" if n is None else f"{n / 1e6:.3g} M" for n in row["tokens"])


def _spread_cells(row: dict[str, Any]) -> list[str]:
    levels = row["difference"]["levels"]
    found = [levels.get(name, {}).get("standard_deviation") for name in ("pretraining", "adaptation")]
    found.append(levels.get("images", {}).get("standard_error"))
    return ["-" if value is None else f"{value:.3f}" for value in found]


def _quality(row: dict[str, Any], name: str, digits: str) -> str:
    found = row["quality"][name]
    return "-" if found is None else plus_minus(found["mean"], found["sample_seeds"], digits)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each quantity, a line for each row, with bars of its interval or spread."""
    rows = result["rows"]

    def interval(found: dict[str, Any] | None) -> tuple[float, float] | None:
        if found is None:
            return None
        low, high = found["interval_95"] or (found["value"], found["value"])
        return found["value"], (high - low) / 2

    def fid(row: dict[str, Any]) -> tuple[float, float] | None:
        found = row["quality"]["fid"]
        return found and (found["mean"], found["sample_seeds"] or 0.0)

    panels: dict[str, Callable[[dict[str, Any]], tuple[float, float] | None]] = {
        "NLL, nats per image (95 %)": lambda row: interval(row["nll"]),
        f"NLL minus {result['reference']} (95 %)": lambda row: interval(row["difference"]),
        "FID (± sd over sample seeds)": fid,
        "images per second": lambda row: row["speed"] and (row["speed"]["images_per_s"], 0.0),
    }
    shown = {title: points for title, cell in panels.items() if any(points := [cell(row) for row in rows.values()])}
    with figure(path, 1, len(shown), (4.2 * len(shown) + 1, 0.4 * len(rows) + 1.4), sharey=True) as axes:
        for axis, (title, points) in zip(axes, shown.items(), strict=True):
            for place, point in enumerate(points):
                if point is not None:
                    axis.errorbar(point[0], place, xerr=point[1] or None, fmt="o", color=f"C{place % 10}", capsize=3)
            if "minus" in title:
                axis.axvline(0, color="0.5", linewidth=1, linestyle="--")
            axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
            axis.grid(alpha=0.3)
