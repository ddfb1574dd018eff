"""A raster autoregressive model: a backbone and its own head (Eq. 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashar_pl.backbones.base import Backbone
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.layers.transformer import Mask
from flashar_pl.models.base import GridModel, States
from flashar_pl.models.dual_head import DualHead


class RasterAR(GridModel):
    """A bare backbone behind the `GridModel` interface, for pre-training and as the baseline. It owns no parameter."""

    method = "raster"
    plan_name = "raster"
    plans = ("raster",)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        dual_head = DualHead(backbone.head, first_code=backbone.first_code)
        object.__setattr__(self, "dual_head", dual_head)  # the head stays registered in the backbone
        self.train(backbone.training)

    def states(self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, n_prefix: int, vertical: bool) -> States:
        return self.backbone.norm(self.backbone.layers(x, rope, mask, cache)), None

    def config(self) -> dict[str, Any]:
        return {"kind": "raster", "backbone": self.backbone.config_dict()}
