"""A decoder with biases, from a directory in transformers' format, on two ranks: each reads its own rows and trains."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flashar_pl.backbones.registry import build_backbone
from flashar_pl.checkpoints.initialise import initialise
from flashar_pl.checkpoints.official import backbone_config
from flashar_pl.models import FlashAR
from flashar_pl.training.sharded.units import shard


def one_step(directory: Path, codes: Tensor, prompts: list[Tensor]) -> dict[str, Any]:
    """Loss and gradients of one forward; on two ranks each has half of the samples, and gradients are averaged."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    with torch.device("meta"):
        model = FlashAR(build_backbone(backbone_config(directory, "visual")), 1)
    if ranks > 1:
        shard(model, init_device_mesh("cpu", (ranks,)), "fp32")
    torch.manual_seed(0)
    initialise(model, directory)
    share = slice(rank, None, ranks)
    model.train().loss(codes[share], prompts[share])["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "gate" not in name}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
