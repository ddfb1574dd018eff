"""Official NAR and LlamaGen-FlashAR weights (LlamaGen with a second head) in and out.

Both store the vertical layers behind the backbone's own, and a second norm and head called medusa.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import LlamaGen
from flashar_pl.checkpoints.llamagen import backbone_renames, block_renames, clean_official, count_layers, infer_config
from flashar_pl.checkpoints.methods import NAR, check_method
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.renames import Rename, StateDict, build_filled, split_rows

Arguments = argparse.Namespace | Mapping[str, Any] | None
"""Of a training script, by name; None = the file has none."""
GATE = "hv_gate_mlp."
"""How the names of a gate on logits begin."""
GATE_RENAMES = (
    Rename("dual_head.gate.hidden.weight", ("hv_gate_mlp.0.weight",)),
    Rename("dual_head.gate.out.weight", ("hv_gate_mlp.2.weight",)),
    Rename("dual_head.gate.out.bias", ("hv_gate_mlp.2.bias",)),
)


def is_nar(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether an official state dict has a second head."""
    return any(key.endswith("medusa_output.weight") for key in state_dict)


def _nar_renames(n_layer: int, extra: int, condition: str, gate: bool = False) -> list[Rename]:
    """Names of a NAR model: backbone, `extra` blocks after the last layer, second norm and head, and the gate."""
    backbone = list(backbone_renames(n_layer, condition))
    renames = [rename.under("backbone.", "") for rename in backbone if rename.ours != "head.weight"]
    for i in range(extra):
        renames += block_renames(f"vertical.blocks.{i}.", f"layers.{n_layer + i}.")
    return [
        *renames,
        Rename("dual_head.horizontal.weight", ("output.weight",)),
        Rename("vertical.norm.weight", ("medusa_norm.weight",)),
        Rename("dual_head.vertical.weight", ("medusa_output.weight",)),
        *(GATE_RENAMES if gate else ()),
    ]


def branch_of(arguments: Arguments, n_blocks: int) -> tuple[int, int]:
    """(m, k) of a checkpoint with `n_blocks` blocks, vertical ones included.

    The weights do not tell m. LlamaGen-FlashAR stores it among the training script's arguments: vertical_start_layer
    (-1 = L, otherwise at most L), or L - k where vertical_start_last_minus_depth is set; k is medusa_attention_num.
    Without arguments it is NAR's: one layer after the last.

    Raises:
        ValueError: the arguments do not fit the number of blocks.
    """
    said = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", {})
    k = int(said.get("medusa_attention_num", 1))
    n_layer = n_blocks - k
    if not 1 <= k <= n_layer:
        raise ValueError(
            f"the checkpoint's arguments say medusa_attention_num {k}, and it has {n_blocks} blocks in all; expected "
            "1 or more vertical layers and no fewer others."
        )
    start = int(said.get("vertical_start_layer", -1))
    if said.get("vertical_start_last_minus_depth", False):
        start = n_layer - k
    return (n_layer if start < 0 else min(start, n_layer)), k


def arguments_of(model: GridModel) -> argparse.Namespace | None:
    """Inverse of `branch_of`: what a file of the authors' LlamaGen-FlashAR says beside its weights. None = another
    model's file."""
    if not isinstance(model, FlashAR) or model.fusion != "logit_gate":
        return None
    return argparse.Namespace(
        vertical_start_layer=model.branch_layer, medusa_attention_num=model.vertical_layers, hv_gate=True
    )


def read_nar(
    state_dict: Mapping[str, Tensor],
    n_head: int,
    *,
    rope_base: float = 10000.0,
    norm_eps: float = 1e-5,
    arguments: Arguments = None,
    branch_layer: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FlashAR:
    """See `FlashAR.from_nar`. arguments: see `branch_of`. dtype None = that of the weights."""
    cleaned = clean_official(state_dict)
    check_method(cleaned, NAR, unknown=True)  # missing names are told later
    gate = any(key.startswith(GATE) for key in cleaned)
    alpha = cleaned.pop("hv_mix_logit", None)  # a gate overrides it
    if alpha is not None and not gate:
        raise ValueError(
            "the checkpoint mixes logits by one number (hv_mix_logit), which this model does not have; expected one "
            "that averages both heads, or weighs them by a gate (hv_gate_mlp)."
        )
    if gate and arguments is None and branch_layer is None:
        raise ValueError(
            "the weights have a gate on logits (hv_gate_mlp), so they are the FlashAR authors', and do not tell the "
            "branch layer; give last_version.pt, whose args do, or FlashAR.from_nar(..., branch_layer=m)."
        )
    n_blocks = count_layers(cleaned)
    m, k = branch_of(arguments, n_blocks)
    n_layer = n_blocks - k
    m = m if branch_layer is None else branch_layer
    config = infer_config(cleaned, n_head, n_layer=n_layer, rope_base=rope_base, norm_eps=norm_eps)
    return build_filled(
        lambda: FlashAR(LlamaGen(config), m, k, fusion="logit_gate" if gate else "average", corner="fused"),
        StateDict(cleaned, "the NAR state dict"),
        _nar_renames(n_layer, k, config.condition, gate),
        device,
        dtype,
    )


def write_nar(model: FlashAR) -> dict[str, Tensor]:
    """See `FlashAR.to_nar`."""
    backbone = model.backbone
    if not isinstance(backbone, LlamaGen):
        raise ValueError(
            f"a FlashAR model trained here on an {backbone.kind} backbone has no official format: NAR checkpoints "
            "are LlamaGen's, and the FlashAR authors' have conventions of their own. Leave --to out for our format."
        )
    if model.temporal is not None:
        raise ValueError(
            "the model draws videos, and there is no official format for them. Leave --to out for our format."
        )
    if model.fusion == "logit_gate" and model.dual_head.corner == "fused" and model.vertical_layers:
        return split_rows(
            model.state_dict(), _nar_renames(backbone.n_layer, model.vertical_layers, backbone.config.condition, True)
        )
    if (model.branch_layer, model.vertical_layers) != (backbone.n_layer, 1) or model.fusion != "average":
        raise ValueError(
            f"the model branches at layer {model.branch_layer} of {backbone.n_layer} with {model.vertical_layers} "
            f"vertical layers and fusion {model.fusion!r}; the only official format for it, a NAR checkpoint, has one "
            "layer after the last and averages. Leave --to out for our format."
        )
    return split_rows(model.state_dict(), _nar_renames(backbone.n_layer, 1, backbone.config.condition))
