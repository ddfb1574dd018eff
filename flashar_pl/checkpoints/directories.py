"""Official Emu3.5 directories (config.json and safetensors files): the base model and the authors' FlashAR.

A model is read tensor by tensor, into memory of its own (`read_directory`) or into one that exists already, sharded
over ranks or not (`stream_weights`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashar_pl.backbones.emu35 import Emu35, Heads
from flashar_pl.checkpoints import emu35 as emu35_weights
from flashar_pl.checkpoints.emu35 import (
    backbone_renames,
    found_head_dim,
    is_table,
    parse_config,
    read_json,
)
from flashar_pl.checkpoints.released import MODEL_TYPE, fill_released, read_released
from flashar_pl.checkpoints.sources import INDEX, SINGLE, SafetensorsDirectory
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.renames import fill


def is_official_directory(path: str | Path) -> bool:
    """Whether `path` is a directory whose config.json is in the Hugging Face style, with a model_type."""
    config = Path(path) / "config.json"
    return config.exists() and "model_type" in json.loads(config.read_text())


def read_directory(
    directory: str | Path,
    heads: Heads = "visual",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GridModel:
    """RasterAR from the base model, FlashAR from the authors' checkpoint, read tensor by tensor into `device`.

    dtype None = the checkpoint's.
    """
    if read_json(directory)["model_type"] == MODEL_TYPE:
        return read_released(directory, heads, device, dtype)
    return RasterAR(emu35_weights.read_directory(directory, heads, device, dtype))


def backbone_config(directory: str | Path, heads: Heads) -> dict[str, Any]:
    """`Backbone.config_dict()` of the model in `directory`; no weights are read."""
    values, source = read_json(directory), SafetensorsDirectory(directory)
    prefix = "backbone." if values.get("model_type") == MODEL_TYPE else "model."
    return {"kind": Emu35.kind, **parse_config(values, heads, found_head_dim(source, prefix)).to_dict()}


def stream_weights(model: GridModel, directory: str | Path, device: torch.device | str = "cpu") -> tuple[int, int]:
    """Copy an official directory into `model`, tensor by tensor, each rank its own rows only.

    The model may be on the meta device (it gets memory on `device`) and sharded by FSDP2. From the base model a
    FlashAR model takes its backbone and horizontal head, clones its vertical branch from them, and on the meta device
    gets a new gate. Returns the numbers of parameters that were cloned, and that the directory does not hold.

    Raises:
        ValueError: names or shapes do not fit, or the authors' FlashAR checkpoint is given to another kind of model.
    """
    if not isinstance(model.backbone, Emu35):
        raise ValueError(f"{directory} holds an Emu3.5 model; this run has a {model.backbone.kind} backbone.")
    source = SafetensorsDirectory(directory)
    if read_json(directory).get("model_type") == MODEL_TYPE:
        if not isinstance(model, ReleasedFlashAR):
            raise ValueError(
                f"{directory} holds a FlashAR checkpoint with its authors' conventions, which this model does not "
                "have; load it with FlashAR.from_released, or start from the base model."
            )
        fill_released(model, directory, device)
        return 0, 0
    flashar = isinstance(model, FlashAR)
    head = "dual_head.horizontal.weight" if flashar else "backbone.head.weight"
    renames = backbone_renames(model.backbone.config, "backbone.", head)
    without_values = any(parameter.is_meta for parameter in model.parameters())
    fill(model, source, renames, device, filter(is_table, source.keys()))
    if not isinstance(model, FlashAR):
        return 0, 0
    if without_values and model.dual_head.gate is not None:
        model.dual_head.gate.reset_parameters()
    model.init_vertical_from_backbone()
    sizes = [(model.role(name), parameter.numel()) for name, parameter in model.named_parameters()]
    cloned = sum(size for role, size in sizes if role in ("vertical", "vertical_head"))
    return cloned, sum(size for role, size in sizes if role == "gate")


def check_original(model: GridModel, original: str | Path) -> None:
    """ValueError unless `original` is an official directory of the same layout and sizes as `model`."""
    if not is_official_directory(original):
        raise ValueError(f"{original} is no official Emu3.5 directory; expected config.json and safetensors files.")
    released = read_json(original)["model_type"] == MODEL_TYPE
    if released != isinstance(model, ReleasedFlashAR):
        kinds = {True: "FlashAR authors' checkpoint", False: "base model"}
        raise ValueError(
            f"{original} is the {kinds[released]}, the model to write has the layout of the {kinds[not released]}."
        )
    assert isinstance(model.backbone, Emu35)
    own, other = model.backbone.config.to_dict(), backbone_config(original, model.backbone.config.heads)
    sizes = ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "ffn_dim", "vocab_size", "visual_token_offset")
    different = [f"{name} {other[name]} (the model: {own[name]})" for name in sizes if other[name] != own[name]]
    if different:
        raise ValueError(f"{original} has other sizes: {'; '.join(different)}.")


def write_directory(
    directory: str | Path, tensors: dict[str, Tensor], original: str | Path, shard_bytes: int = 5_000_000_000
) -> None:
    """Write an official state dict as a directory with the config.json of `original`; it appears whole or not at all.

    More than `shard_bytes` are cut into files of at most that size (single tensors may be larger), with an index.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        shards = _cut(tensors, shard_bytes)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        for name, shard in zip(names, shards, strict=True):
            save_file({key: tensors[key].contiguous() for key in shard}, part / name, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            (part / INDEX).write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            )
        shutil.copyfile(Path(original) / "config.json", part / "config.json")
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _cut(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut where a file would pass `limit` bytes."""
    shards: list[list[str]] = []
    room = 0
    for key, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= tensor.nbytes
    return shards
