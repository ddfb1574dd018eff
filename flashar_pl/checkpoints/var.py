"""Published VAR weights in and out: names are the network's, two tables are derived from the scales and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from flashar_pl.checkpoints.methods import check_method
from flashar_pl.models.baselines.var import VAR
from flashar_pl.models.baselines.var_transformer import VARConfig, VARTransformer
from flashar_pl.renames import Rename, StateDict, build_filled, official_state_dict, on_meta, split_rows

NAME = "the VAR state dict"
NEEDED = ("depth", "embed_dim", "num_heads", "patch_nums")
HEAD_WIDTH = 64
"""Of every published size."""


def read_config(state: StateDict, config: Mapping[str, Any]) -> VARConfig:
    """The published settings; only the code dimension is read from the tensors."""
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"the settings of VAR lack {', '.join(missing)}; they have {', '.join(config)}.")
    check_method(state.keys(), "VAR")
    known = {each.name for each in fields(VARConfig)} - {"code_dim"}
    given = {key: value for key, value in config.items() if key in known}
    given["patch_nums"] = tuple(int(p) for p in config["patch_nums"])
    embedding = state.tensors.get("word_embed.weight")
    if embedding is not None and embedding.ndim == 2:  # otherwise the strict load names it
        given["code_dim"] = embedding.shape[1]
    return VARConfig(**given)


def tables(model: VAR) -> dict[str, Tensor]:
    """The two derived tensors of a published file: the scale of every position, and the training mask, 0 or -inf."""
    level = model.backbone.level()
    hidden = level[:, None] < level[None]
    bias = torch.zeros(hidden.shape, dtype=model.dtype, device=level.device).masked_fill_(hidden, float("-inf"))
    return {"lvl_1L": level[None], "attn_bias_for_masking": bias[None, None]}


def read_official(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> VAR:
    """See `VAR.from_official`."""
    source = StateDict(official_state_dict(state_dict)[0], NAME)
    return _filled(source, read_config(source, config))


def read_var_file(state: Mapping[str, Tensor], n_head: int | None) -> VAR:
    """A model from a published state dict alone: its sizes are those of the tensors.

    n_head: of a file without normalised attention, where heads are not 64 wide.
    """
    source = StateDict(state, NAME)
    return _filled(source, read_config(source, sizes_of(state, n_head)))


def sizes_of(state: Mapping[str, Tensor], n_head: int | None) -> dict[str, Any]:
    """The published settings that the tensors tell. ValueError where those that tell them are missing, or would take
    more memory than the file has bytes."""
    needed = ("lvl_1L", "pos_start", "head.weight", "class_emb.weight", "blocks.0.ffn.fc1.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"{NAME} is not the expected checkpoint: {len(missing)} missing keys ({', '.join(missing)}).")
    width, temperatures = state["pos_start"].shape[-1], state.get("blocks.0.attn.scale_mul_1H11")
    levels, cells = state["lvl_1L"].flatten().long().unique(return_counts=True)
    if levels.tolist() != list(range(len(levels))):
        raise ValueError(f"lvl_1L of {NAME} numbers the scales {levels.tolist()[:9]}; expected 0, 1, 2, ...")
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    return {
        "depth": len(blocks),
        "embed_dim": width,
        "num_heads": n_head or width // HEAD_WIDTH if temperatures is None else temperatures.shape[1],
        "vocab_size": len(state["head.weight"]),
        "num_classes": len(state["class_emb.weight"]) - 1,
        "patch_nums": [isqrt(n) for n in cells.tolist()],
        "shared_aln": any(name.startswith("shared_ada_lin.") for name in state),
        "attn_l2_norm": temperatures is not None,
        "mlp_ratio": len(state["blocks.0.ffn.fc1.weight"]) / width,
    }


def network_renames(names: Iterable[str]) -> list[Rename]:
    """Of the tensors of a model, by our names."""
    return [Rename(name, (name.removeprefix("backbone."),)) for name in names]


def _filled(source: StateDict, spec: VARConfig) -> VAR:
    renames = network_renames(on_meta(lambda: VAR(VARTransformer(spec))).state_dict())
    n = spec.length
    derived = {"lvl_1L": (1, n), "attn_bias_for_masking": (1, 1, n, n)}
    model = build_filled(lambda: VAR(VARTransformer(spec)), source, renames, ignored=derived)
    if missing := [name for name in derived if name not in source.tensors]:
        raise ValueError(f"{NAME} is not the expected checkpoint: {len(missing)} missing keys ({', '.join(missing)}).")
    stored = {name: source.tensors[name] for name in derived}
    odd = [name for name, shape in derived.items() if stored[name].shape != shape]  # before (n, n) is made of n
    odd = odd or [name for name, own in tables(model).items() if not torch.equal(stored[name].to(own), own)]
    if odd:
        raise ValueError(f"{odd[0]} of {NAME} is not that of patch_nums {list(spec.patch_nums)}; give the file's own.")
    return model


def write_official(model: VAR) -> dict[str, Tensor]:
    """See `VAR.to_official`."""
    state = model.state_dict()
    return {**split_rows(state, network_renames(state)), **tables(model)}
