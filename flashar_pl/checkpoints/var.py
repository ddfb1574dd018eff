"""Published VAR weights in and out: names are ours, two tables are derived from the scales and checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flashar_pl.checkpoints.methods import check_method
from flashar_pl.models.baselines.var import VAR, VARConfig
from flashar_pl.renames import Rename, StateDict, build_filled, official_state_dict, split_rows

NAME = "the VAR state dict"
NEEDED = ("depth", "embed_dim", "num_heads", "patch_nums")


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
    level = model.level()
    hidden = level[:, None] < level[None]
    bias = torch.zeros(hidden.shape, dtype=model.dtype, device=level.device).masked_fill_(hidden, float("-inf"))
    return {"lvl_1L": level[None], "attn_bias_for_masking": bias[None, None]}


def read_official(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> VAR:
    """See `VAR.from_official`."""
    source = StateDict(official_state_dict(state_dict)[0], NAME)
    spec = read_config(source, config)
    with torch.device("meta"):
        renames = [Rename(name, (name,)) for name in VAR(spec).state_dict()]
    derived = ("lvl_1L", "attn_bias_for_masking")
    model = build_filled(lambda: VAR(spec), source, renames, ignored=derived)
    for name, table in tables(model).items():
        if name not in source.tensors:
            raise ValueError(f"{NAME} is not the expected checkpoint: 1 missing keys ({name}).")
        if not torch.equal(source.tensors[name].to(table), table):
            raise ValueError(
                f"{name} of {NAME} is not that of patch_nums {list(spec.patch_nums)}; give the file's own."
            )
    return model


def write_official(model: VAR) -> dict[str, Tensor]:
    """See `VAR.to_official`."""
    state = model.state_dict()
    return {**split_rows(state, [Rename(name, (name,)) for name in state]), **tables(model)}
