"""A backbone that this package has never seen: other names, 1-D positions, a norm of its own and no published sizes."""

from typing import Any

import torch
from torch import Tensor, nn

from flashar_pl.backbones import Backbone, ClassIds, Condition, Conditioning, Prefix
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.rope import Rope, angles_1d, rotations
from flashar_pl.layers.transformer import BlockConfig


class OwnBackbone(Backbone):
    """Class-conditional, for the digits."""

    kind = "own"

    def __init__(self, width: int = 16, depth: int = 2, codes: int = 17, classes: int = 10) -> None:
        super().__init__()
        self.sizes = {"width": width, "depth": depth, "codes": codes, "classes": classes}
        self.dim, self.n_layer, self.vocabulary = width, depth, codes
        self.conditioning = Conditioning("class", classes)
        self.block = BlockConfig(width, n_head=2, n_kv_head=1, head_dim=width // 2, ffn_dim=3 * width, qk_norm=True)
        self.labels, self.table = nn.Embedding(classes + 1, width), nn.Embedding(codes, width)
        self.mixer = nn.Linear(width, width)  # of the condition
        self.blocks = nn.ModuleList(self.make_block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes, bias=False)

    def config_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.sizes}

    def embed(self, codes: Tensor) -> Tensor:
        return self.table(codes)

    def prefix(self, condition: Condition) -> Prefix:
        assert isinstance(condition, ClassIds)
        return Prefix(self.mixer(self.labels(condition.ids))[:, None], torch.ones_like(condition.ids))

    def null_condition(self, condition: Condition) -> Condition:
        assert isinstance(condition, ClassIds)
        return ClassIds(torch.full_like(condition.ids, self.conditioning.size))

    def rope(self, plan: DecodePlan, prefix: Prefix) -> Rope:
        device = prefix.x.device
        cells = plan.on("row", device) * plan.width + plan.on("column", device)
        position = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), 1 + cells])
        return rotations(angles_1d(position, self.block.head_dim, 10000.0))[None]


class Unfinished(Backbone):
    """Abstract, so it cannot be used."""

    kind = "unfinished"
