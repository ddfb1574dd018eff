"""Official weights of every kind: which kind a file or directory is, read into a model, and written.

Files hold LlamaGen, NAR or LlamaGen-FlashAR weights; directories (config.json and safetensors files) hold Emu3.5, its
authors' FlashAR, or a model in transformers' format, and are read tensor by tensor into memory of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.base import plain
from flashar_pl.backbones.decoder import Decoder
from flashar_pl.backbones.decoder_config import Heads
from flashar_pl.backbones.emu35 import Emu35
from flashar_pl.backbones.llamagen import PRESETS, LlamaGen
from flashar_pl.checkpoints.baselines import read_par_file
from flashar_pl.checkpoints.emu35 import MODEL_TYPE, OfficialDirectory, read_backbone
from flashar_pl.checkpoints.hub import HubDirectory
from flashar_pl.checkpoints.llamagen import clean_official, read_official
from flashar_pl.checkpoints.methods import method_of
from flashar_pl.checkpoints.nar import Arguments, arguments_of, is_nar, read_nar
from flashar_pl.checkpoints.released import read_model
from flashar_pl.checkpoints.safetensors_files import write_shards
from flashar_pl.checkpoints.var import read_var_file
from flashar_pl.files import new_directory, replacing
from flashar_pl.models.base import GridModel
from flashar_pl.models.baselines import PAR, VAR, BlockDiffusion
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.tensor_files import save_checked
from flashar_pl.text_files import read_json

FILE_SUFFIXES = (".pt", ".pth", ".safetensors")
"""Endings of official files."""

EMU35_TYPES = ("Emu3", MODEL_TYPE)
"""`model_type` of Emu3.5 and of its authors' FlashAR."""
NO_MODEL = {
    "BlockDiffusion": "whose strategy they do not tell: BlockDiffusion.from_official, docs/baselines.md",
    "multi-scale VQ (VAR's tokenizer)": "which decode codes: --tokenizer multi_scale_vq:FILE",
    "VQ or IBQ tokenizer": "which decode codes: --tokenizer vq16:FILE, or the directory of an IBQ tokenizer",
}
"""Methods of `method_of` whose files alone are no model, and what is to be done with them."""

# --- files ---------------------------------------------------------------------------------------------------------


def read_official_model(
    state_dict: Mapping[str, Tensor],
    n_head: int | None,
    arguments: Arguments = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GridModel:
    """RasterAR from LlamaGen weights, PAR and VAR from theirs, FlashAR from NAR and LlamaGen-FlashAR weights.

    n_head None = that of the published size. arguments: of the training script, where the file holds them. dtype None =
    the file's; VAR is read as it is stored.
    """
    cleaned = clean_official(state_dict)
    if (method := method_of(cleaned)) in NO_MODEL:
        raise ValueError(f"the file holds {method} weights, {NO_MODEL[method]}.")
    if method == "VAR":
        return read_var_file(cleaned, n_head)
    n_head = n_head or _published_heads(cleaned)
    if is_nar(cleaned):
        return read_nar(cleaned, n_head, arguments=arguments, device=device, dtype=dtype)
    if method == "PAR":
        return read_par_file(cleaned, n_head, device, dtype)
    return RasterAR(read_official(cleaned, n_head, device=device, dtype=dtype))


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
    """The official state dict of a raster, PAR, VAR, BlockDiffusion, NAR-shaped or released model.

    source: directory that an Emu3.5 model with visual heads came from, for the text rows of its heads.
    """
    if isinstance(model, ReleasedFlashAR):
        return model.to_released(source)
    if isinstance(model, FlashAR):
        return model.to_nar()
    if isinstance(model, PAR | VAR | BlockDiffusion):
        return model.to_official()
    if isinstance(model.backbone, Emu35):
        return model.backbone.to_official(source)
    if isinstance(model.backbone, Decoder):
        return model.backbone.to_transformers()
    assert isinstance(model.backbone, LlamaGen)
    return model.backbone.to_official()


# --- directories ---------------------------------------------------------------------------------------------------


def is_official_directory(path: str | Path) -> bool:
    """Whether `path` is a directory whose config.json is in the Hugging Face style, with a model_type."""
    config = Path(path) / "config.json"
    return config.exists() and "model_type" in read_json(config)


def open_directory(directory: str | Path) -> OfficialDirectory | HubDirectory:
    """The reader of a directory that `is_official_directory`. Emu3.5 is "Emu3" in its config.json, Emu3 is "emu3"."""
    kind = str(read_json(Path(directory) / "config.json").get("model_type"))
    return OfficialDirectory(directory) if kind in EMU35_TYPES else HubDirectory(directory)


def read_directory(
    directory: str | Path,
    heads: Heads = "visual",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GridModel:
    """RasterAR from a base model, FlashAR from the authors' checkpoint, read tensor by tensor into `device`.

    dtype None = the checkpoint's.
    """
    source = open_directory(directory)
    if isinstance(source, HubDirectory):
        return source.read(heads, device, dtype)
    if source.released:
        return read_model(source, heads, device, dtype)
    return RasterAR(read_backbone(source, source.config(heads), device, dtype))


def backbone_config(directory: str | Path, heads: Heads) -> dict[str, Any]:
    """`Backbone.config_dict()` of the model in `directory`; no weights are read."""
    source = open_directory(directory)
    return {"kind": source.kind, **plain(asdict(source.config(heads)))}


def check_original(model: GridModel, original: str | Path) -> None:
    """ValueError unless `original` is an official directory of the same layout and sizes as `model`."""
    if not is_official_directory(original):
        raise ValueError(f"{original} is no official Emu3.5 directory; expected config.json and safetensors files.")
    source = OfficialDirectory(original)
    if source.released != isinstance(model, ReleasedFlashAR):
        kinds = {True: "FlashAR authors' checkpoint", False: "base model"}
        raise ValueError(
            f"{original} is the {kinds[source.released]}, the model to write has the layout of the "
            f"{kinds[not source.released]}."
        )
    assert isinstance(model.backbone, Emu35)
    own, found = vars(model.backbone.config), vars(source.config(model.backbone.config.heads))
    sizes = ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "ffn_dim", "vocab_size", "visual_token_offset")
    different = [f"{name} {found[name]} (the model: {own[name]})" for name in sizes if found[name] != own[name]]
    if different:
        raise ValueError(f"{original} has other sizes: {'; '.join(different)}.")


def write_official(target: Path, model: GridModel, path: str | Path, original: str | Path | None) -> Path:
    """Write official weights: a file, or the directory of a family that is published as directories; what was written.

    path: what the model was read from. original: official directory that gives config.json and the text rows of heads
    that the model does not hold; None = `path`, if it is one.
    """
    if not isinstance(model.backbone, Emu35):
        if original is not None:
            raise ValueError("--original is for models that are published as directories; leave it out.")
        tensors, arguments = official_weights(model), arguments_of(model)
        target = target if target.suffix in FILE_SUFFIXES else target / "model.pt"
        if arguments is not None and target.suffix == ".safetensors":
            raise ValueError(
                f"{target} would hold weights alone, which do not tell the branch layer; expected a .pt file, such as "
                f"--out {target.with_suffix('.pt')}."
            )
        with replacing(target) as part:
            if target.suffix == ".safetensors":
                save_checked(tensors, part)
            else:
                torch.save({"model": tensors} | ({} if arguments is None else {"args": arguments}), part)
        return target
    if target.suffix in FILE_SUFFIXES:
        raise ValueError(f"official Emu3.5 weights are a directory, such as --out {target.with_suffix('')}.")
    if original is None and is_official_directory(path):
        original = path
    if type(model) is FlashAR:
        model.to_nar()  # says why there is no official format for it
    if original is None:
        raise ValueError(
            f"{path} holds what decoding needs; add --original DIR, the official directory the model came from, for "
            "config.json and the text rows of the heads."
        )
    check_original(model, original)
    with new_directory(target, "checkpoint") as part:
        write_shards(part, official_weights(model, original))
        shutil.copyfile(Path(original) / "config.json", part / "config.json")
    return target
