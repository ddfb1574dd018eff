"""Several training runs in one table: their results, and the settings in which they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashar_pl.commands.plot import Curve

RESULTS = ("val/nll", "val/fid", "val/accuracy", "val/gate_mean")
COMPARED = (
    *("seed_everything", "model.", "data.", "trainer.max_steps", "trainer.max_epochs", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "trainer.strategy."),
)
NOT_COMPARED = ("model.validation.samples", "model.validation.features", "model.validation.grid_images")
"""Beginnings of the settings that make a result, and those among them that only look at it."""


def side_by_side(runs: dict[str, dict[str, Any]], curves: dict[str, dict[str, Curve]]) -> str:
    """Markdown: a row for each run, with its steps, the newest value of each result, and what differs in config.yaml.

    runs: name -> facts with "directory" and "steps". A setting that a run does not have is shown as -.
    """
    settings = {name: read_settings(Path(facts["directory"]) / "config.yaml") for name, facts in runs.items()}
    differing = [key for key in sorted(set().union(*settings.values())) if _differs(key, list(settings.values()))]
    results = [tag for tag in RESULTS if any(tag in found for found in curves.values())]
    short = [key.removeprefix("model.").removeprefix("trainer.") for key in differing]
    aligned = ["---", *["---:"] * (1 + len(results)), *["---"] * len(short)]
    lines = [_row(["run", "steps", *results, *short]), _row(aligned)]
    for name, facts in runs.items():
        values = [f"{curves[name][tag][1][-1]:.4g}" if tag in curves[name] else "-" for tag in results]
        own = [str(settings[name].get(key, "-")) for key in differing]
        lines.append(_row([name, f"{facts['steps']:,}", *values, *own]))
    return "\n".join(lines)


def read_settings(file: Path) -> dict[str, Any]:
    """config.yaml of a run with dotted keys, without empty values; {} where there is none."""
    import yaml

    if not file.is_file():
        return {}
    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return {key: value for key, value in _flat(values) if value is not None}


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _differs(key: str, every: list[dict[str, Any]]) -> bool:
    compared = key.startswith(COMPARED) and not key.startswith(NOT_COMPARED)
    return compared and any(values.get(key) != every[0].get(key) for values in every[1:])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
