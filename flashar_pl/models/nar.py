"""Official NAR weights (LlamaGen with a second head) in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import LlamaGen
from flashar_pl.backbones.llamagen_weights import (
    backbone_renames,
    block_renames,
    clean_official,
    count_layers,
    gather,
    infer_config,
    load_strictly,
    scatter,
)
from flashar_pl.models.flashar import FlashAR


def is_nar(state_dict: dict[str, Tensor]) -> bool:
    """Whether an official state dict has a second head."""
    return any(key.endswith("medusa_output.weight") for key in state_dict)


NAR_HEAD = {
    "vertical.norm.weight": ("medusa_norm.weight",),
    "dual_head.vertical.weight": ("medusa_output.weight",),
}


def _nar_renames(n_layer: int, extra: int, condition: str) -> list[tuple[str, tuple[str, ...]]]:
    """Names of a NAR model: backbone, `extra` blocks after the last layer, second norm and head."""
    renames = [
        (
            ours.replace("head.weight", "dual_head.horizontal.weight") if ours == "head.weight" else f"backbone.{ours}",
            src,
        )
        for ours, src in backbone_renames(n_layer, condition)
    ]
    for i in range(extra):
        renames += block_renames(f"vertical.blocks.{i}.", f"layers.{n_layer + i}.")
    return renames + list(NAR_HEAD.items())


def read_nar(state_dict: dict[str, Tensor], n_head: int, *, rope_base: float, norm_eps: float) -> FlashAR:
    """See `FlashAR.from_nar`."""
    cleaned = clean_official(state_dict)
    gates = sorted(key for key in cleaned if key.startswith("hv_"))
    if gates:
        raise ValueError(
            f"the checkpoint mixes logits by a gate on logits ({', '.join(gates)}), which this model does not have; "
            "only checkpoints that average both heads can be imported."
        )
    n_layer = count_layers(cleaned) - 1
    config = infer_config(cleaned, n_head, n_layer=n_layer, rope_base=rope_base, norm_eps=norm_eps)
    weights = gather(cleaned, _nar_renames(n_layer, 1, config.condition))
    with torch.device("meta"):
        model = FlashAR(LlamaGen(config), n_layer, vertical_layers=1, fusion="average", corner="fused")
    load_strictly(model, weights)
    return model


def write_nar(model: FlashAR) -> dict[str, Tensor]:
    """See `FlashAR.to_nar`."""
    backbone = model.backbone
    if (model.branch_layer, model.vertical_layers) != (backbone.n_layer, 1) or model.fusion != "average":
        raise ValueError(
            f"the model branches at layer {model.branch_layer} of {backbone.n_layer} with {model.vertical_layers} "
            f"vertical layers and fusion {model.fusion!r}; a NAR checkpoint has one layer after the last and averages."
        )
    assert isinstance(backbone, LlamaGen)
    return scatter(model.state_dict(), _nar_renames(backbone.n_layer, 1, backbone.config.condition))
