"""First values of what no official directory holds: the gate, the head between cells of a diagonal, mask and time of
block diffusion, and the matrices A of LoRA (B starts at 0).

They are a function of the seed alone, not of where the random generator stands: one process has built a whole random
model before, shards have not.
"""

from __future__ import annotations

import torch
from torch import nn

from flashar_pl.models.base import GridModel
from flashar_pl.models.baselines import BlockDiffusion
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.gates import FusionGate
from flashar_pl.models.intra import IntraHead
from flashar_pl.models.lora import ADAPTER, adapted_layers


def new_parts(model: GridModel) -> list[tuple[nn.Module, nn.Module]]:
    """(part of `model`, a whole copy of it with its first values), on the CPU in float32. The generator stays as it
    was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        made: list[tuple[nn.Module, nn.Module]] = []
        if isinstance(model, FlashAR) and (gate := model.new_gate()) is not None:
            assert model.dual_head.gate is not None
            made.append((model.dual_head.gate, gate))
        if (time_gate := model.dual_head.time_gate) is not None:
            made.append((time_gate, FusionGate(model.backbone.dim)))
        if (intra := model.dual_head.intra) is not None:
            made.append((intra, IntraHead(model.backbone.dim)))
        if isinstance(model, BlockDiffusion):
            made += zip((model.mask, model.time), model.new_embeddings(), strict=True)
        for _, _, layer in adapted_layers(model):
            a = layer.lora_A[ADAPTER]
            made.append((a, nn.Linear(a.in_features, a.out_features, bias=False)))
    return made
