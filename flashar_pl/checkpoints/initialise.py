"""What a training run starts from: weights of any file, copied or streamed into the run's own model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.emu35 import backbone_renames
from flashar_pl.checkpoints.hub import HubDirectory
from flashar_pl.checkpoints.llama_names import is_table
from flashar_pl.checkpoints.official import backbone_config, is_official_directory, open_directory
from flashar_pl.checkpoints.released import ignored, renames
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models.base import ROLES, GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.lora import added_parameters, frozen_names, without_adapters
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.options import Weights
from flashar_pl.renames import fill

NOT_ARCHITECTURE = (
    *("unconditional_prompt", "null_token_id", "multiple_of", "ffn_dim_multiplier", "backbone"),
    *("usual_grid", "cfg_scale", "code_pixels", "model_type", "text_prefix", "head_key", "tied_head"),
)
"""Fields that, besides dropouts, may differ between a file and the run that starts from it."""
INTRA = "dual_head.intra."
"""How the names of an `IntraHead`'s parameters begin."""
CLASSES, TABLE = "num_classes", "backbone.condition_embedding.table.weight"
"""Field of the number of classes, and the weight that depends on nothing else."""


@dataclass
class InitReport:
    """What became of a model's tensors when a run started from a file."""

    source: str
    loaded: int
    """Parameters taken from the file."""
    cloned: int
    """Parameters of the vertical branch copied from the backbone."""
    new: int
    """Parameters with fresh values."""

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.loaded:,} parameters loaded, {self.cloned:,} cloned into the vertical branch, "
            f"{self.new:,} new"
        )


def initialise(model: GridModel, path: str | Path, weights: Weights = "auto") -> InitReport:
    """Start `model` from a file: official, raster or FlashAR weights.

    A raster file fills the backbone, and a FlashAR model clones its vertical branch from it. A FlashAR file fills
    everything. Values are copied into the model's own dtypes. The matrices that LoRA adds keep theirs.

    Raises:
        ValueError: the file's architecture is not the model's; the message names the fields that differ. Or its
            classes are other ones, and their table, which is new, is never trained.
    """
    with without_adapters(model):
        source, whole, kept = _take_over(model, path, weights)
        if TABLE in kept and TABLE in frozen_names(model):
            raise ValueError(
                f"{path} has another number of classes, and this run trains no table of them (model.lora, or "
                "model.flashar.intra.alone): it would stay random. Train all weights first, or start from "
                "weights of as many classes."
            )
        sizes = dict.fromkeys(ROLES, 0)
        for role, parameter in zip(model.roles().values(), model.parameters(), strict=True):
            sizes[role] += parameter.numel()
    beside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    own = beside if isinstance(model, RasterAR) else sizes["gate"] + sizes["added"]  # a mask, embeddings of time
    cloned, new = (0, 0) if whole else (sizes["vertical"] + sizes["vertical_head"], own)
    loaded = sum(sizes.values()) - cloned - new
    fresh = sum(value.numel() for value in kept.values())
    return InitReport(f"{path} ({source})", loaded - fresh, cloned, new + fresh + added_parameters(model))


def _take_over(model: GridModel, path: str | Path, weights: Weights) -> tuple[str, bool, dict[str, Tensor]]:
    """What kind of file it was; whether it held all parameters, not only those of backbone and horizontal head; which
    of those stay new: the table of classes, where the file has another number, and an `IntraHead` it does not have."""
    own = model.config()["backbone"]
    if is_official_directory(path):
        check_same("backbone", backbone_config(path, own.get("heads", "visual")), own, path)
        return "official directory", stream_weights(model, path), {}
    loaded = load_model(path, weights, n_head=own["n_head"] if own["kind"] == LlamaGen.kind else None)
    source = loaded.model
    found = source.config()["backbone"]
    same = isinstance(source, FlashAR) and isinstance(model, FlashAR)
    if type(source) is not RasterAR and type(source) is not type(model) and not same:
        raise ValueError(
            f"{path} is a {source.method} model and this run trains a {model.method} model; expected raster weights"
            f"{'' if type(model) is RasterAR else f', or those of {model.method}'}."
        )
    chosen, state, own_state = loaded.source, source.state_dict(), model.state_dict()
    kept: dict[str, Tensor] = {}
    check_same("backbone", found, own, path, (CLASSES,) if TABLE in state else ())
    if TABLE in state and _classes(found) != _classes(own):
        kept[TABLE] = own_state[TABLE]
        chosen += f", its {_classes(found):,} classes are other ones: the table of {_classes(own):,} classes is new"
    if type(source) is not RasterAR:
        config = {**source.config(), "backbone": own}
        if "intra" not in config:
            kept |= {name: value for name, value in own_state.items() if name.startswith(INTRA)}
        free = ("steps", "intra") if "intra" in model.config() else ("steps",)
        check_same("model", config, model.config(), path, free)
        model.load_state_dict(state | kept)
        return chosen, True, kept
    state |= kept
    expected = model.backbone.state_dict()  # without the head where a FlashAR model owns it
    within = {key.removeprefix("backbone."): value for key, value in state.items()}
    model.backbone.load_state_dict({key: value for key, value in within.items() if key in expected})
    model.backbone.head.load_state_dict(source.backbone.head.state_dict())
    if isinstance(model, FlashAR):
        model.init_vertical_from_backbone()
    return chosen, type(model) is RasterAR, kept


def _classes(config: dict[str, Any]) -> int | None:
    """Number of classes of a backbone's configuration; None where it has no classes."""
    return _resolved(config).get(CLASSES)


def stream_weights(model: GridModel, directory: str | Path, device: torch.device | str = "cpu") -> bool:
    """Copy an official directory into `model`, tensor by tensor, each rank its own rows only.

    The model may be on the meta device (it gets memory on `device`) and sharded by FSDP2. From the base model a
    FlashAR model takes its backbone and horizontal head, clones its vertical branch from them, and on the meta device
    gets a new gate. Returns whether the directory held every parameter.

    Raises:
        ValueError: names or shapes do not fit, or the authors' FlashAR checkpoint is given to another kind of model.
    """
    source, config = open_directory(directory), model.backbone.config
    if source.kind != model.backbone.kind:
        raise ValueError(f"{directory} holds a model of kind {source.kind}; this run's is {model.backbone.kind}.")
    if source.released:
        if not isinstance(model, ReleasedFlashAR):
            raise ValueError(
                f"{directory} holds a FlashAR checkpoint with its authors' conventions, which this model does not "
                "have; load it with FlashAR.from_released, or start from the base model."
            )
        fill(model, source, renames(config, model.vertical_layers), device, ignored(source))
        return True
    flashar = isinstance(model, FlashAR)
    head = "dual_head.horizontal" if flashar else "backbone.head"
    without_values = any(parameter.is_meta for parameter in model.parameters())
    if isinstance(source, HubDirectory):
        weights = source.language_model(config.heads)
        fill(model, weights, weights.renames("backbone.", head), device, weights.beside)
    else:
        table = backbone_renames(config, "backbone.", f"{head}.weight")
        fill(model, source, table, device, filter(is_table, source.keys()))
    if isinstance(model, FlashAR):
        for part in (model.dual_head.gate, model.dual_head.time_gate, model.dual_head.intra) if without_values else ():
            if part is not None:
                part.reset_parameters()
        model.init_vertical_from_backbone()
    return False


def check_same(
    what: str, found: dict[str, Any], expected: dict[str, Any], path: str | Path, free: tuple[str, ...] = ()
) -> None:
    """ValueError naming the fields in which the config `found` at `path` differs from the `expected` one.

    what: which config, for the message: "backbone", or "model", whose fields are options of its method. free: fields
    that may differ.
    """
    found, expected = _resolved(found), _resolved(expected)
    option = f"--model.{expected['kind']}." if what == "model" else ""
    different = [
        f"{option}{key} {found.get(key)!r} (this run: {expected.get(key)!r})"
        for key in sorted((found.keys() | expected.keys()) - {*NOT_ARCHITECTURE, *free})
        if not key.endswith("dropout") and found.get(key) != expected.get(key)
    ]
    if different:
        raise ValueError(f"{path} holds another {what}: {'; '.join(different)}.")


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The config with defaults and derived sizes filled in, so that equal models compare equal."""
    if config.get("kind") != LlamaGen.kind:
        return config
    values = LlamaGenConfig(**{key: value for key, value in config.items() if key != "kind"})
    unused = ("caption_dim", "caption_positions") if values.condition == "class" else ("num_classes",)
    resolved = {**config, **asdict(values), "ffn_dim": values.block.ffn_dim, "n_kv_head": values.block.n_kv_head}
    return {key: value for key, value in resolved.items() if key not in unused}
