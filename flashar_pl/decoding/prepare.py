"""Copies of a model for inference, with weights in a form that decodes faster or takes less memory."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashar_pl.layers.packed import PackedLinear, unsupported
from flashar_pl.layers.transformer import Block
from flashar_pl.models.base import GridModel
from flashar_pl.models.quiet import quiet_torchao

WEIGHT_FORMATS = ("plain", "packed", "int8", "fp8")
"""plain = as they are. packed: laid out for the CPU's matrix products, equal up to rounding. int8, fp8: one byte per
weight and a scale per output, rounded; activations keep their dtype (needs torchao)."""
FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with float8."""


@torch.no_grad()
def prepare(model: GridModel, weights: str = "plain") -> GridModel:
    """A copy of `model` for inference, which shares no weight with it; for "plain" the model itself.

    The projections of all blocks and both heads (only the rows that score codes) change their form. Embeddings, norms,
    the gate and what embeds the condition do not. The copy generates codes and computes logits; it has no loss.

    Raises:
        ValueError: an unknown format, one that this device cannot run, a sharded model, or no torchao for int8, fp8.
    """
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weight format is {weights!r}; expected one of {', '.join(WEIGHT_FORMATS)}.")
    if weights == "plain":
        return model
    if not has_blocks(model):
        kind = model.config()["kind"]
        raise ValueError(f"weight format is {weights!r}, which a {kind} model does not have; expected plain.")
    if model.sharded or model.shared:
        raise ValueError(f"weight format is {weights!r}, and devices share the model; expected plain.")
    change = _packer(model) if weights == "packed" else _quantiser(weights, model.device)
    head = model.dual_head
    known: dict[int, Any] = {}  # what stands in the copy for a module of the model, by id
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
            known[id(linear)] = change(linear.weight, linear.bias)
    for linear in (part for part in (head.horizontal, head.vertical) if part is not None):
        known[id(linear)] = change(*head.code_rows(linear))
    made = copy.deepcopy(model, known)
    made.dual_head.first_code = made.backbone.first_code = 0
    return made.eval().requires_grad_(False)


def has_blocks(model: GridModel) -> bool:
    """Whether the model is made of the blocks that can be packed, rounded and compiled."""
    return any(isinstance(module, Block) for module in model.modules())


def _packer(model: GridModel) -> Callable[[Tensor, Tensor | None], nn.Module]:
    if model.device.type != "cpu":
        raise ValueError(
            f"weight format is 'packed', which is for processors, and the model is on {model.device}; use plain."
        )
    reason = unsupported(model.dual_head.horizontal.weight.dtype)
    if reason is not None:
        raise ValueError(f"weight format is 'packed', and {reason}; use plain.")
    return PackedLinear


def _quantiser(weights: str, device: torch.device) -> Callable[[Tensor, Tensor | None], nn.Module]:
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"weight format is {weights!r}, which needs torchao: pip install 'flashar-pl[large]'.")
    if weights == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"weight format is 'fp8', and {name} has no float8 (compute capability 8.9); use int8.")
    with quiet_torchao():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig()

    def change(weight: Tensor, bias: Tensor | None) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        zero = (weight == 0).all(1)
        if weights == "fp8" and zero.any():  # torchao would divide 0 by the largest weight of an output, 0
            linear.weight[zero] = 1.0
            quantize_(linear, config)
            cast(Any, linear.weight).qdata.view(torch.uint8)[zero] = 0
        else:
            quantize_(linear, config)
        return linear

    return change
