"""The training loss as plainly as published code computes it, to compare with; nothing else uses it.

Every logit of both heads and of their mix exists at once, in float32, and autograd keeps what it wants.

Shapes: B samples, N cells, V codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.backbones.condition import Given
from flashar_pl.grid import DecodePlan
from flashar_pl.models.base import GridModel, States
from flashar_pl.models.losses import AUX_WEIGHT
from flashar_pl.models.sources import sources


def head_loss(model: GridModel, states: States, codes: Tensor, plan: DecodePlan) -> Tensor:
    """The training loss (Eq. 9 plus 0.05 times Eq. 10) from states, with three logit tensors (B, N, V)."""
    head = model.dual_head
    h, v = states if plan.t_source is None else head.together(*states, None, plan)
    assert v is not None and head.vertical is not None
    where = sources(plan, head.corner, h.device)
    z_h = head.horizontal(h[:, where.h]).float()  # (B, N, V)
    z_v = head.vertical(v[:, where.v]).float()  # (B, N, V)
    fused = torch.lerp(z_v, z_h, head.gates(h, v, plan)[..., None])  # (B, N, V)
    target = codes.flatten(1) + head.first_code  # (B, N)
    loss = F.cross_entropy(fused.flatten(0, 1), target.flatten())
    has_h, has_v = (plan.h_source >= 0).to(h.device), (plan.v_source >= 0).to(h.device)
    horizontal = F.cross_entropy(z_h[:, has_h].flatten(0, 1), target[:, has_h].flatten())
    vertical = F.cross_entropy(z_v[:, has_v].flatten(0, 1), target[:, has_v].flatten())
    return loss + AUX_WEIGHT * (horizontal + vertical)


def plain_loss(model: GridModel, codes: Tensor, condition: Given, plan: DecodePlan) -> Tensor:
    """Equal to `model.loss(...)["loss"]` up to rounding, for the diagonal plan."""
    return head_loss(model, model.teacher_forced(codes, condition, plan, plan.n_inputs), codes, plan)
