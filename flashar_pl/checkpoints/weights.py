"""Weights of grid models: official files in and out, our own files, and what a training run starts from.

Our format is a directory with `config.json` (everything needed to build the model, plus grid and tokenizer) and
`model.safetensors`. Lightning checkpoints carry the same description under the key "flashar". Every file is read with
`weights_only=True`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashar_pl.backbones.emu35 import Emu35
from flashar_pl.backbones.llamagen import PRESETS, LlamaGen
from flashar_pl.checkpoints.architecture import check_same
from flashar_pl.checkpoints.description import Description, build_on_meta
from flashar_pl.checkpoints.directories import backbone_config, is_official_directory, read_directory, stream_weights
from flashar_pl.checkpoints.llamagen import clean_official
from flashar_pl.checkpoints.nar import is_nar, read_nar
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY, EMA_PREFIX, NET_PREFIX, RunCheckpoint
from flashar_pl.checkpoints.sharded import is_sharded
from flashar_pl.files import new_directory, read_json, read_tensors, write_json
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.lora import LoraConfig, added_parameters, merge, without_adapters
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR

Weights = Literal["auto", "raw", "ema"]
"""Which weights of a checkpoint to use: "auto" = averaged ones if present."""


@dataclass
class Loaded:
    """A model read from a file."""

    model: GridModel
    description: Description
    source: str
    """What kind of file it was, for messages."""


# --- official containers -------------------------------------------------------------------------------------------


def official_state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside an official container: under "model", "module" or "state_dict", or the content itself."""
    for key in ("model", "module", "state_dict"):
        inner = content.get(key)
        if isinstance(inner, dict):
            return inner
    return content


def read_official_model(
    state_dict: dict[str, Tensor],
    n_head: int | None,
    *,
    rope_base: float = 10000.0,
    norm_eps: float = 1e-5,
    arguments: argparse.Namespace | None = None,
) -> GridModel:
    """RasterAR from LlamaGen weights, FlashAR from NAR and LlamaGen-FlashAR weights.

    n_head None = that of the published size. arguments: of the training script, where the file holds them.
    """
    cleaned = clean_official(state_dict)
    n_head = n_head or _published_heads(cleaned)
    if is_nar(cleaned):
        return read_nar(cleaned, n_head, rope_base=rope_base, norm_eps=norm_eps, arguments=arguments)
    return RasterAR(LlamaGen.from_official(cleaned, n_head, rope_base=rope_base, norm_eps=norm_eps))


def _published_heads(state_dict: dict[str, Tensor]) -> int:
    embedding = state_dict.get("tok_embeddings.weight")
    if embedding is None:
        raise ValueError("not a LlamaGen checkpoint: tok_embeddings.weight is missing.")
    heads = {config.dim: config.n_head for config in PRESETS.values()}
    if embedding.shape[1] not in heads:
        raise ValueError(
            f"width {embedding.shape[1]} is no published size, and weights do not tell the number of heads; "
            "give it: --n-head."
        )
    return heads[embedding.shape[1]]


def official_weights(model: GridModel, source: str | Path | None = None) -> dict[str, Tensor]:
    """The official state dict of a raster, NAR-shaped or released model.

    source: directory that an Emu3.5 model with visual heads came from, for the text rows of its heads.
    """
    if isinstance(model, ReleasedFlashAR):
        return model.to_released(source)
    if isinstance(model, FlashAR):
        return model.to_nar()
    if isinstance(model.backbone, Emu35):
        return model.backbone.to_official(source)
    assert isinstance(model.backbone, LlamaGen)
    return model.backbone.to_official()


# --- our own files -------------------------------------------------------------------------------------------------


def save_model(directory: str | Path, model: GridModel, description: Description) -> None:
    """Write `config.json` and `model.safetensors`; the directory must not exist. It appears complete or not at all."""
    with new_directory(directory, "model") as part:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part / "model.safetensors")
        write_json(part / "config.json", description.to_dict())


def load_model(
    path: str | Path,
    weights: Weights = "auto",
    n_head: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """A model from any file: our directory, a Lightning checkpoint (one file or shards), an official LlamaGen or
    NAR file, or an Emu3.5 directory.

    weights concerns Lightning checkpoints. n_head is needed only for official files of unpublished sizes. device and
    dtype concern Emu3.5 directories, which are read straight to where they are used; the rest is read as it is stored.

    Raises:
        ValueError: the path does not exist, is none of these, or its keys and shapes do not fit.
    """
    path = Path(path)
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights is {weights!r}; expected auto, raw or ema.")
    if is_official_directory(path):
        model = read_directory(path, "visual", device, dtype)
        return Loaded(model, Description(model=model.config()), "official directory (visual heads)")
    if path.is_dir() and not is_sharded(path):
        if not (path / "config.json").exists() or not (path / "model.safetensors").exists():
            files = sorted(f for pattern in ("*.ckpt", "*.pt", "checkpoints/*.ckpt") for f in path.glob(pattern))
            hint = f" Did you mean {files[-1]}?" if files else ""
            raise ValueError(f"{path} holds no config.json and model.safetensors; expected a converted model.{hint}")
        description = Description.from_dict(read_json(path / "config.json"))
        return Loaded(_fill(description, read_tensors(path / "model.safetensors")), description, "converted model")
    content = {} if path.is_dir() else read_tensors(path, mmap=True)
    if path.is_dir() or CHECKPOINT_KEY in content:
        run = RunCheckpoint(path)
        stored, kind = _stored_names(run.names(), weights, path)
        model = _fill(run.description, run.tensors(stored))
        return Loaded(model, run.description, f"{'sharded ' * run.sharded}checkpoint ({kind} weights)")
    if weights == "ema":
        raise ValueError(f"{path} is an official file without averaged weights; use --weights auto.")
    model = read_official_model(official_state_dict(content), n_head, arguments=content.get("args"))
    return Loaded(model, Description(model=model.config()), "official file")


def _stored_names(names: Iterable[str], weights: Weights, path: Path) -> tuple[dict[str, str], str]:
    """(name of a model's tensor -> name of the wanted one in a Lightning checkpoint, "raw" or "ema").

    Of weights that never train a checkpoint holds no average.
    """
    names = list(names)
    raw = {name.removeprefix(NET_PREFIX): name for name in names if name.startswith(NET_PREFIX)}
    averaged = {name.removeprefix(EMA_PREFIX): name for name in names if name.startswith(EMA_PREFIX)}
    if weights == "ema" and not averaged:
        raise ValueError(f"{path} holds no averaged weights; use --weights raw.")
    return (raw | averaged, "ema") if averaged and weights != "raw" else (raw, "raw")


def _fill(description: Description, state: dict[str, Tensor]) -> GridModel:
    if description.lora is not None:
        state, description.lora = dict(merge(state, LoraConfig(**description.lora))), None
    model = build_on_meta(description.model)
    load_strictly(model, state)
    return model


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Make `weights` the module's own, without a copy, and put it in evaluation mode.

    A wrong shape raises ValueError naming the key and both shapes.
    """
    expected = module.state_dict()
    for key, value in weights.items():
        if key in expected and expected[key].shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; this model expects {tuple(expected[key].shape)}.")
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:  # missing or unexpected keys
        raise ValueError(f"the weights do not fit the model: {error}") from error
    module.eval()


# --- starting a run ------------------------------------------------------------------------------------------------


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
        ValueError: the file's architecture is not the model's; the message names the fields that differ.
    """
    with without_adapters(model):
        report = _initialise(model, path, weights)
    report.new += added_parameters(model)
    return report


def _initialise(model: GridModel, path: str | Path, weights: Weights) -> InitReport:
    if is_official_directory(path):
        return _initialise_from_directory(model, path)
    heads = model.backbone.config.n_head if isinstance(model.backbone, LlamaGen) else None
    loaded = load_model(path, weights, n_head=heads)
    source = loaded.model
    check_same("backbone", source.config()["backbone"], model.config()["backbone"], path)
    if isinstance(source, FlashAR) and isinstance(model, RasterAR):
        raise ValueError(f"{path} is a FlashAR model and this run trains a raster model; expected raster weights.")
    total = sum(p.numel() for p in model.parameters())
    if isinstance(source, FlashAR):
        check_same("model", source.config(), model.config(), path)
        model.load_state_dict(source.state_dict())
        return InitReport(f"{path} ({loaded.source})", total, 0, 0)
    with torch.no_grad():
        expected = model.backbone.state_dict()  # without the head where a FlashAR model owns it
        model.backbone.load_state_dict({k: v for k, v in source.backbone.state_dict().items() if k in expected})
        model.backbone.head.weight.copy_(source.backbone.head.weight)
    taken = sum(p.numel() for p in source.parameters())
    if not isinstance(model, FlashAR):
        return InitReport(f"{path} ({loaded.source})", taken, 0, total - taken)
    model.init_vertical_from_backbone()
    roles = model.roles()
    cloned = sum(p.numel() for name, p in model.named_parameters() if roles[name] in ("vertical", "vertical_head"))
    return InitReport(f"{path} ({loaded.source})", taken, cloned, total - taken - cloned)


def _initialise_from_directory(model: GridModel, path: str | Path) -> InitReport:
    """`initialise` from an official Emu3.5 directory, read into the model itself."""
    own = model.config()["backbone"]
    check_same("backbone", backbone_config(path, own.get("heads", "visual")), own, path)
    cloned, new = stream_weights(model, path)
    total = sum(p.numel() for p in model.parameters())
    return InitReport(f"{path} (official directory)", total - cloned - new, cloned, new)
