"""A linear probe of every layer: from which depth a raster model's features tell the code below (Fig. 3).

Shapes: B samples, S slots, N cells, M cells with a cell above, D width, V codes, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, slot_codes
from flashar_pl.backbones.condition import Given, as_condition
from flashar_pl.grid import DecodePlan, diagonal_plan
from flashar_pl.models.losses import HeadInputs, head_nll


@torch.no_grad()
def layer_states(backbone: Backbone, codes: Tensor, condition: Given, plan: DecodePlan) -> list[Tensor]:
    """States (B, S, D) of all slots before the first layer and after each of the L: L + 1 of them, teacher-forced.

    codes (B, H, W) int64. The backbone should be in evaluation mode.
    """
    prefix = backbone.prefix(as_condition(condition))
    x = torch.cat([prefix.x, backbone.embed(slot_codes(codes, plan))], dim=1)
    rope, mask = backbone.rope(plan, prefix), backbone.attention_mask(plan, prefix, plan.n_slots)
    states = [x]
    for layer in range(backbone.n_layer):
        states.append(backbone.layers(states[-1], rope, mask, start=layer, stop=layer + 1))
    return [state[:, len(prefix) :] for state in states]


class LayerProbe(nn.Module):
    """A vertical head on a learnt mixture of layers: softmax weights, each layer's states at unit scale (Fig. 3a).

    Norm and head start as copies of the backbone's, the weights equal.

    Args:
        backbone: whose states are probed; it is not kept.
        layers: which of its L + 1 states, 0 = the embeddings, L = the last layer's.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int]) -> None:
        super().__init__()
        if not layers or not all(0 <= layer <= backbone.n_layer for layer in layers):
            raise ValueError(f"layers are {list(layers)}; expected some of 0 to {backbone.n_layer}.")
        self.layers = list(layers)
        self.first_code = backbone.first_code
        self.mixture = nn.Parameter(torch.zeros(len(self.layers), device=backbone.head.weight.device))
        norm: Any = backbone.norm
        self.scale = nn.Parameter(norm.weight.detach().float().clone())
        shift = getattr(norm, "bias", None)
        self.shift = None if shift is None else nn.Parameter(shift.detach().float().clone())  # of LayerNorm
        self.logit_scale: float = norm.scale
        self.head = nn.Parameter(backbone.head.weight.detach().float().clone())  # (V, D)

    @property
    def weights(self) -> Tensor:
        """(len(layers),) share of each layer; they sum to 1."""
        return self.mixture.softmax(0)

    def nll(self, states: Sequence[Tensor], codes: Tensor, plan: DecodePlan) -> tuple[Tensor, Tensor]:
        """The mean loss, a scalar with gradients, and (B, M) nats of every code that has one above it.

        states: L + 1 times (B, S, D), see `layer_states`; codes (B, H, W) int64.
        """
        below = diagonal_plan(plan.height, plan.width)
        targets = (below.v_source >= 0).nonzero().squeeze(1)  # (M,)
        above = plan.slot[below.cell[below.v_source[targets]]].to(codes.device)  # (M,) slots of the cells above them
        x = torch.zeros_like(states[0][:, above], dtype=torch.float32)  # (B, M, D)
        for weight, layer in zip(self.weights, self.layers, strict=True):
            chosen = states[layer][:, above].float()
            x = x + weight * F.rms_norm(chosen, chosen.shape[-1:])
        x = self._normed(x).flatten(0, 1) * self.logit_scale
        labels = codes.flatten(1)[:, targets.to(codes.device)].flatten() + self.first_code
        total, nll = head_nll(HeadInputs(x, self.head, labels, torch.ones(len(labels), device=x.device)))
        return total / len(labels), nll.view(len(codes), -1)

    def _normed(self, x: Tensor) -> Tensor:
        if self.shift is None:
            return F.rms_norm(x, x.shape[-1:], self.scale)
        return F.layer_norm(x, x.shape[-1:], self.scale, self.shift)
