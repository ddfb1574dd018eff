"""FlashAR for Emu3.5 as its authors released it (lxazjk/Emu3.5-FlashAR): their conventions.

Their code differs from the paper in four places:

- The vertical layers attend to image tokens only, not to the prefix.
- (0, 0) is a mix of the horizontal head and of the vertical head on the raw trunk state of the last prefix token, by a
  gate of its own.
- Positions count on from row to row; in pre-training the place of the row-end token was left free.
- With guidance, the image positions of a conditional and its unconditional row both start after the longer prefix:
  they pad the shorter one on the right.

Shapes: R rows, L positions of this forward, K visible positions, P prefix, D width, M pairs of states.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone
from flashar_pl.backbones.condition import Prefix
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.layers.transformer import Mask
from flashar_pl.models.dual_head import DualHead
from flashar_pl.models.flashar import FlashAR
from flashar_pl.numerics import full_precision, wide


class CornerGate(nn.Module):
    """sigmoid(w h + b) in float32: the weight of the horizontal logits at (0, 0). It starts at 0.5."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        """h (..., D) -> (...) float32."""
        with full_precision(h.device.type):
            return torch.sigmoid(nn.functional.linear(wide(h), wide(self.out.weight), wide(self.out.bias))).squeeze(-1)


class ReleasedDualHead(DualHead):
    """Both heads with the gate, and a second gate for (0, 0)."""

    def __init__(self, dual_head: DualHead, corner_gate: CornerGate) -> None:
        super().__init__(dual_head.horizontal, dual_head.vertical, dual_head.gate, "released", dual_head.first_code)
        self.corner_gate = corner_gate

    def weigh(self, h: Tensor, v: Tensor, corner: bool) -> Tensor:
        gate = super().weigh(h, v, corner)
        return torch.cat([self.corner_gate(h[:, :1]), gate[:, 1:]], dim=1) if corner else gate


class ReleasedFlashAR(FlashAR):
    """FlashAR on an Emu3.5 backbone with the authors' conventions. Made by `FlashAR.from_released`, or by `build_model`
    from a config that such a model wrote."""

    backbone: Any
    null_style = "released"
    vertical_sees_prefix = False

    def __init__(self, backbone: Backbone, branch_layer: int, vertical_layers: int) -> None:
        if not hasattr(backbone, "rope_at"):
            raise ValueError(f"a {backbone.kind} backbone has no one-dimensional positions; expected one with rope_at.")
        super().__init__(backbone, branch_layer, vertical_layers)
        like = self.dual_head.horizontal.weight
        with torch.device(like.device):
            self.dual_head = ReleasedDualHead(self.dual_head, CornerGate(backbone.dim).to(like.dtype))

    def rope(self, plan: DecodePlan, prefix: Prefix, guided: bool = False) -> Rope:
        start = prefix.lengths  # (R,)
        if guided:
            conditional, unconditional = start.chunk(2)
            start = torch.maximum(conditional, unconditional).repeat(2)
        row_ends = plan.n_slots > plan.n_cells  # each needs a position
        return self.backbone.rope_at(plan, prefix, start, plan.width + row_ends)

    def vertical_states(self, trunk: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, n_prefix: int) -> Tensor:
        """As `FlashAR.vertical_states`, but those of the prefix are the raw trunk states."""
        n_new = trunk.shape[1]
        n_cached = 0 if cache is None else cache.filled
        mask = without_prefix(mask, n_prefix, n_new, n_cached + n_new, trunk.device)
        v = super().vertical_states(trunk, rope, mask, cache, n_prefix)
        n = max(0, n_prefix - n_cached)  # positions of this forward that belong to the prefix
        return torch.cat([trunk[:, :n], v[:, n:]], dim=1)

    def to_released(self, source: str | Path | None = None) -> dict[str, Tensor]:
        """The authors' state dict, bit-exact inverse of `from_released`.

        source: directory the model came from; heads="visual" takes the text rows of both heads there.
        """
        return resolve_name("flashar_pl.checkpoints.released:write_released")(self, source)


def without_prefix(mask: Mask, n_prefix: int, n_new: int, n_visible: int, device: torch.device) -> Tensor:
    """`mask` with the prefix hidden from the image: (1 or R, 1, L, K) bool for the last n_new of K positions.

    L is n_new, or 1 where `mask` has one row or none and all new positions belong to the image.
    """
    keys = torch.arange(n_visible, device=device)
    allowed = (keys >= n_prefix)[None]  # (1, K)
    if n_visible - n_new < n_prefix:
        allowed = allowed | (keys[n_visible - n_new :, None] < n_prefix)  # (n_new, K)
    if isinstance(mask, str):
        allowed = allowed.tril()
    return mask & allowed if isinstance(mask, Tensor) else allowed[None, None]
