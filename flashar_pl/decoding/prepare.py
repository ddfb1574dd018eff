"""Copies of a model for inference, with weights in a form that decodes faster or takes less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashar_pl.layers.packed import PackedLinear, unsupported
from flashar_pl.layers.rounded import RoundedLinear, Rounding
from flashar_pl.layers.transformer import Block
from flashar_pl.models.base import GridModel
from flashar_pl.numerics import moved

WEIGHT_FORMATS = ("plain", "packed", "int8", "fp8")
"""plain = as they are. packed: laid out for the CPU's matrix products, equal up to rounding. int8, fp8: one byte per
weight and a scale per output, rounded; activations, too, where the device multiplies bytes (`layers.rounded`)."""
FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with float8."""


@torch.no_grad()
def prepare(model: GridModel, weights: str = "plain", device: torch.device | None = None) -> GridModel:
    """A copy of `model` for inference, which shares no weight with it; for "plain" the model itself.

    device: where rounded weights are to be (None = where the model is). From the CPU they go there one by one, so that
    it never holds more than one of them as it was.

    The projections of all blocks and both heads (only the rows that score codes) change their form. Embeddings, norms,
    the gate and what embeds the condition do not. The copy generates codes and computes logits; it has no loss.

    Raises:
        ValueError: an unknown format, one that this device cannot run, or a sharded model.
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
    place = model.device if device is None else device
    change = _packer(model) if weights == "packed" else _rounder(cast(Rounding, weights), place)
    head = model.dual_head
    known: dict[int, Any] = {}  # what stands in the copy for a module of the model, by id
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
            known[id(linear)] = change(linear.weight, linear.bias)
    for linear in (part for part in (head.horizontal, head.vertical) if part is not None):
        known[id(linear)] = change(*head.code_rows(linear))
    made = copy.deepcopy(model, known).to(place)
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


def _rounder(rounding: Rounding, device: torch.device) -> Callable[[Tensor, Tensor | None], nn.Module]:
    if rounding == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"weight format is 'fp8', and {name} has no float8 (compute capability 8.9); use int8.")
    return lambda weight, bias: RoundedLinear(moved(weight.detach(), device), bias, rounding).to(device)
