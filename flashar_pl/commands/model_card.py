"""The README.md of an exported model: what it is, how it was trained and measured, and what its owner must fill in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.opening import count_parameters
from flashar_pl.console import versions

if TYPE_CHECKING:
    from flashar_pl.checkpoints.opening import Source

FILL_IN = "FILL IN"
"""Marks what the owner of the model must write before publishing it."""
SHOWN_SAMPLE_FACTS = (
    *("plan", "number", "labels", "cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "seed", "batch_size"),
    *("dtype", "image_size", "resized", "weights", "checkpoint_sha256", "features"),
)


def read_report(path: str | Path, model: dict[str, Any]) -> dict[str, Any]:
    """The evaluation.json at `path`, if it was measured on a model with this config.

    Raises:
        ValueError: no such file, no evaluation, or one of another architecture.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no report at {file}; expected the evaluation.json that flashar evaluate wrote.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("command") != "evaluate":
        raise ValueError(f"{file} is no report of flashar evaluate; expected its evaluation.json.")
    if report["checkpoint"]["model"] != json.loads(json.dumps(model)):
        raise ValueError(f"{file} was measured on another model: its configuration is not that of the exported one.")
    return report


def model_card(source: Source, report: dict[str, Any] | None = None) -> str:
    """Markdown. source: the exported model; report: see `read_report`."""
    config = source.model.config()
    plan = "diagonal" if config["kind"] == "flashar" else "raster"
    name = {"flashar": "FlashAR", "raster": "Raster"}[config["kind"]]
    grid = "not known" if source.grid is None else f"{source.grid[0]} x {source.grid[1]} codes"
    sections = [
        f"---\nlicense: {FILL_IN}\nlibrary_name: flashar-pl\n---",
        f"# {name} image generator: {FILL_IN} (a name)",
        _table(
            "Model",
            {
                "kind": config["kind"],
                "parameters": f"{count_parameters(source.model):,}",
                "grid": grid,
                "tokenizer": _inline(source.tokenizer or "not known"),
                **{key: value for key, value in config.items() if key not in ("kind", "backbone")},
                **{f"backbone {key}": value for key, value in config["backbone"].items()},
                "exported from": f"{Path(source.path).name} ({source.kind})",
            },
        ),
        _use(config, plan),
        _metrics(report),
        _training(source),
        _licences(),
        f"Written by flashar-pl {versions()['flashar-pl']}.",
    ]
    return "\n\n".join(sections) + "\n"


def _use(config: dict[str, Any], plan: str) -> str:
    condition = config["backbone"].get("condition")
    what = {"class": "--classes 0-7", "text": "--text-features captions.npz"}.get(condition, '--prompt "..."')
    kind = "FlashAR" if config["kind"] == "flashar" else "RasterAR"
    return (
        f"## Use\n\n    flashar generate --checkpoint DIRECTORY {what} --plan {plan} --out samples/\n\n"
        f"    from flashar_pl.models import {kind}\n    model = {kind}.from_pretrained(DIRECTORY)"
    )


def _metrics(report: dict[str, Any] | None) -> str:
    if report is None:
        return f"## Metrics\n\n{FILL_IN}: not measured yet; see `flashar evaluate`."
    samples, reference = report["samples"], report["reference"]
    rows = {name: f"{value:.6g}" for name, value in report["metrics"].items()}
    shown = {key: samples[key] for key in SHOWN_SAMPLE_FACTS if samples.get(key) is not None}
    shown["reference"] = _inline({key: value for key, value in reference.items() if key not in ("arrays", "path")})
    return "\n\n".join([_table("Metrics", rows), _table("How they were measured", shown, level=3)])


def _training(source: Source) -> str:
    training = source.description.training
    if not training:
        return f"## Training and data\n\n{FILL_IN}: data set, its licence, and how the weights were trained."
    text = json.dumps(training, indent=2)
    return (
        f"## Training and data\n\n{FILL_IN}: data set and its licence.\n\nThe run that wrote the weights:\n\n"
        f"```json\n{text}\n```"
    )


def _licences() -> str:
    rows = {
        "these weights": FILL_IN,
        "the weights they started from": FILL_IN,
        "the tokenizer's weights": FILL_IN,
        "the training data": FILL_IN,
    }
    return _table("Licences", rows)


def _table(title: str, rows: dict[str, Any], level: int = 2) -> str:
    lines = [f"| {key} | {_inline(value)} |" for key, value in rows.items()]
    return "\n".join([f"{'#' * level} {title}", "", "| | |", "|---|---|", *lines])


def _inline(value: Any) -> str:
    """A value in one cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
