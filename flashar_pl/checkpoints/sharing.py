"""What a directory of a model needs for others: a card, and copies of the files that it names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashar_pl.checkpoints.description import Description
from flashar_pl.models.base import GridModel
from flashar_pl.tensor_files import save_checked
from flashar_pl.tokenizers import VQ16, build_tokenizer

PAPER = "[FlashAR](https://arxiv.org/abs/2605.09430)"
TASKS = {"class": "unconditional-image-generation"}
"""What huggingface.co calls a model by its condition, where it is not text-to-image."""


def gathered(description: Description, directory: Path) -> Description:
    """The description with copies in `directory` of what it names for drawing: the tokenizer's files and the prompts'.

    LlamaGen's tokenizers become safetensors, since nothing else is fetched from a repository.

    Raises:
        ValueError: nothing is there, or the path is a stranger's.
    """
    tokenizer, training, copied = dict(description.tokenizer or {}), dict(description.training), set()
    places = ((tokenizer, "weights", "tokenizer"), (tokenizer, "settings", "settings"), (training, "prompts", "text"))
    for values, key, place in places:
        if not isinstance(named := values.get(key), str):
            continue
        source = Path(named).expanduser()
        if named in description.strange or not source.exists():
            why = "no command of yours named it" if named in description.strange else "nothing is there"
            raise ValueError(f"{key} {named!r} cannot be copied: {why}.")
        own = build_tokenizer(description.tokenizer or {}) if key == "weights" and source.is_file() else None
        values[key] = place + (".safetensors" if isinstance(own, VQ16) else source.suffix)
        copied.add(values[key])
        if isinstance(own, VQ16):
            save_checked(own.to_official(), directory / values[key])
        else:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, directory / values[key])
    return replace(description, tokenizer=tokenizer or None, training=training, strange=description.strange | copied)


def facts(model: GridModel, description: Description) -> dict[str, str]:
    """What there is to say of a model, by headings."""
    config, own = description.model, model.backbone
    condition = {"prompt": "token ids"}.get(own.conditioning.kind, own.conditioning.kind)
    lines = {
        "model": f"{config['kind']}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{next(model.parameters()).dtype}",
        "backbone": f"{config['backbone']['kind']}: dim {own.dim}, n_layer {own.n_layer}, n_head {own.block.n_head}, "
        f"n_kv_head {own.block.n_kv_head}, vocabulary {own.vocabulary}, condition {condition}",
    }
    if config["kind"] == "flashar":
        keys = ("branch_layer", "vertical_layers", "fusion", "corner")
        lines["FlashAR"] = ", ".join(f"{key} {config[key]}" for key in keys)
    grid = description.grid
    lines["grid"] = "not known" if grid is None else f"{grid[0]} x {grid[1]}"
    lines["tokenizer"] = str(description.tokenizer or "not known")
    return lines


def recipe(training: Mapping[str, Any]) -> str | None:
    """How a run trained the model; None = the checkpoint does not say."""
    settings, step, total = training.get("settings"), training.get("step"), training.get("total_steps")
    if not isinstance(settings, dict) or step is None:
        return None
    words = [f"{step:,} of {total:,} steps" if isinstance(total, int) else f"{step:,} steps"]
    words.append(f"from {settings['init_from']}" if settings.get("init_from") else "from random weights")
    for group, name in (("optimiser", "lr"), ("schedule", "stage1_share"), ("schedule", "backbone_factor")):
        if name in (values := settings.get(group) or {}) and (group == "optimiser" or settings.get("flashar")):
            words.append(f"{name} {values[name]}")
    if settings.get("ema_decay") is not None:
        words.append(f"averaged with {settings['ema_decay']}")
    return ", ".join(words)


def card(name: str, model: GridModel, description: Description, scores: Mapping[str, float]) -> str:
    """README.md of a directory called `name`. scores: of the validation at which the weights were kept."""
    lines, training, grid = facts(model, description), description.training, description.grid
    if (trained := recipe(training)) is not None:
        lines["trained"] = trained
    if description.class_names:
        shown = description.class_names
        lines["classes"] = ", ".join(shown[:20]) + (f" and {len(shown) - 20:,} more" if len(shown) > 20 else "")
    lines |= {key: f"{value:.5g}" for key, value in scores.items()}
    says = "An autoregressive image generator over a grid of codes."
    if description.model["kind"] == "flashar":
        says = f"A raster autoregressive image generator that {PAPER} lets decode a diagonal of its grid a step"
        steps = None if grid is None else model.make_plan("diagonal", *grid).n_steps
        says += "." if grid is None else f": {steps} steps instead of {model.make_plan('raster', *grid).n_steps}."
    kind = model.backbone.conditioning.kind
    asked = {"class": "classes=[0]"}.get(kind, 'prompt="a fox in the snow"')
    encoder = ', text_encoder="DIRECTORY OF ITS T5"' if kind == "text" else ""
    return "\n".join([
        "---", "library_name: flashar-pl", f"pipeline_tag: {TASKS.get(kind, 'text-to-image')}", "---", f"# {name}", "",
        says, "", "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in lines.items()), "",
        "With [flashar-pl](https://pypi.org/project/flashar-pl/) installed, in the directory that holds this one:", "",
        "```python", "from flashar_pl import FlashARPipeline", "",
        f'pipeline = FlashARPipeline.from_pretrained("{name}"{encoder})',
        f"pipeline({asked}).images[0].save(\"sample.png\")",
        "```", "",
        "No licence is chosen here: that of the weights it was trained from, and of the data, goes on.", "",
    ])  # fmt: skip


def _cell(text: str) -> str:
    """A checkpoint's words as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
