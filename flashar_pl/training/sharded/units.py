"""How a model is cut over devices with FSDP2: which modules are gathered together, and in which dtypes.

Every block, every embedding and the pair of heads is a unit: its parameters are gathered in the compute dtype while it
runs, and are float32 shards otherwise. The gate is gathered in float32. What is left (final norms, a raster model's
head) belongs to the model itself. So a model is entered through its registered methods, never through its parts.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from flashar_pl.layers.transformer import Block
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.lora import frozen_names

Compute = Literal["bf16", "fp32"]
"""Dtype of the gathered parameters and of activations."""
DOORS = ("enter", "loss", "prefix", "prefill", "step", "step_logits", "draw_step")
"""Methods of a model, besides forward, in which its parameters exist."""
HEAD_DOORS = ("losses", "step", "draw_step")
"""The same of a `DualHead`."""
FLOAT32_UNITS = ("gate", "corner_gate", "time_gate")
"""Parts of a `DualHead` that compute in float32."""


def shard(model: GridModel, mesh: DeviceMesh, compute: Compute = "bf16", offload: bool = False) -> GridModel:
    """Cut the parameters of `model` over `mesh`, in place; the model may be on the meta device.

    mesh: (shards,) or (replicas, shards). Gradients are reduced in float32. What LoRA keeps frozen may be bfloat16
    among float32 parameters. offload: shards, gradients and optimiser states stay in CPU memory.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # none is written to
    low = torch.bfloat16 if compute == "bf16" else torch.float32
    inner = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    entry = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)  # text features come as float32
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    backbone, dual_head = model.backbone, model.dual_head
    for name, part in backbone.named_children():
        if name not in ("blocks", "norm", "head"):
            fully_shard(part, mp_policy=entry, **options)
    for block in blocks(model):
        fully_shard(block, mp_policy=inner, **options)
    for name in FLOAT32_UNITS:
        if (gate := getattr(dual_head, name, None)) is not None:
            fully_shard(gate, mp_policy=whole, **options)
    if "dual_head" in dict(model.named_children()):  # a raster model's head belongs to its backbone
        fully_shard(dual_head, mp_policy=inner, **options)
        for method in HEAD_DOORS:
            register_fsdp_forward_method(dual_head, method)
    fully_shard(model, mp_policy=inner, **options)
    cast(Any, model).enter = _nothing
    for method in DOORS:
        register_fsdp_forward_method(model, method)
    return model


def blocks(model: GridModel) -> list[nn.Module]:
    """All transformer blocks: the backbone's, then those of the branches."""
    branches = model.branches if isinstance(model, FlashAR) else []
    return [*model.backbone.blocks, *(block for branch in branches for block in branch.blocks)]


def recompute_blocks(model: GridModel) -> None:
    """Keep only the inputs of blocks for the backward pass, which runs each block again."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


def _nothing() -> None:
    """A door to nowhere: entering it makes FSDP2 settle what it settles once."""


def local(tensor: Tensor) -> Tensor:
    """This device's part of a parameter; all of it where it is not sharded. Writing to it writes the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def allocate(model: GridModel, device: torch.device, offload: bool = False, like: GridModel | None = None) -> None:
    """Give a sharded model on the meta device memory: parameters hold NaN until weights are loaded.

    like: a model of the same shards that has memory; what never trains takes it from there.

    All that ever train must require gradients now, and what LoRA keeps frozen must not: FSDP2 settles at the first
    entry in which dtype the gradients of a unit are kept, for a frozen unit in the compute dtype.
    """
    frozen = frozen_names(model)
    assert all(parameter.requires_grad == (name not in frozen) for name, parameter in model.named_parameters())
    place, theirs = "cpu" if offload else device, {} if like is None else dict(like.named_parameters())
    memory = {
        name: theirs[name].detach() if name in frozen and name in theirs else torch.empty_like(parameter, device=place)
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(memory, assign=True, strict=False)
    for name, parameter in model.named_parameters():
        if name not in frozen or name not in theirs:
            local(parameter).fill_(torch.nan)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    cast(Any, model).enter()


@torch.no_grad()
def check_filled(model: GridModel) -> None:
    """AssertionError if a parameter has no memory or value, or one that trains is not float32."""
    frozen = frozen_names(model)
    for name, parameter in model.named_parameters():
        assert name in frozen or parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        assert not parameter.is_meta, f"{name} is on the meta device"
        assert bool(torch.isfinite(local(parameter)).all()), f"{name} has no value"
