"""Sizes of a model, from a backbone that has no memory for weights.

Letters: L layers, m branch layer, k vertical layers, D width, A query heads, G key/value heads, E head width,
F feed-forward width, V codes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from flashar_pl.backbones import Conditioning, describe_backbone
from flashar_pl.layers.transformer import BlockConfig
from flashar_pl.models.base import ROLES
from flashar_pl.models.dual_head import Corner


@dataclass(frozen=True)
class Linear:
    """A weight matrix (n_out, n_in) without bias."""

    name: str
    n_in: int
    n_out: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.n_in * self.n_out


def block_linears(block: BlockConfig) -> tuple[Linear, ...]:
    """The four projections of a transformer block, in the order they run."""
    query, both = block.n_head * block.head_dim, 2 * block.n_kv_head * block.head_dim
    return (
        Linear("wqkv", block.dim, query + both),
        Linear("wo", query, block.dim),
        Linear("w13", block.dim, 2 * block.ffn_dim),
        Linear("w2", block.ffn_dim, block.dim),
    )


@dataclass(frozen=True)
class BackboneSizes:
    """What memory and time of a backbone depend on."""

    backbone: str
    """`Backbone.config_dict()` as JSON."""
    block: BlockConfig
    """Sizes of one block."""
    n_layer: int
    """L."""
    vocabulary: int
    """V, the codes that can be drawn: decoding reads these rows of a head only."""
    head_rows: int
    """Rows of each head, text tokens included: the loss is normalised over them."""
    row_ends: bool
    """Whether the raster plan has forced row-end tokens."""
    conditioning: Conditioning
    usual_grid: tuple[int, int]
    usual_clones: int
    condition_linears: tuple[Linear, ...]
    """Projections that embed the condition."""
    block_parameters: int
    """Of one block."""
    norm_parameters: int
    """Of the final norm."""
    embedding_parameters: int
    """Embeddings of codes, tokens and conditions."""
    buffer_elements: int
    """Constants stored beside the parameters."""


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@lru_cache(maxsize=32)
def _backbone_sizes(config: str) -> BackboneSizes:
    backbone = describe_backbone(json.loads(config))
    block, head, outer = backbone.blocks[0], backbone.head, backbone.condition_linears()
    return BackboneSizes(
        backbone=json.dumps(backbone.config_dict()),
        block=backbone.block,
        n_layer=backbone.n_layer,
        vocabulary=backbone.vocabulary,
        head_rows=head.out_features,
        row_ends=backbone.row_ends,
        conditioning=backbone.conditioning,
        usual_grid=backbone.usual_grid,
        usual_clones=backbone.usual_clones,
        condition_linears=tuple(Linear(name, m.in_features, m.out_features) for name, m in outer.items()),
        block_parameters=count(block),
        norm_parameters=count(backbone.norm),
        embedding_parameters=count(backbone) - count(backbone.blocks) - count(backbone.norm) - count(head),
        buffer_elements=sum(buffer.numel() for buffer in backbone.buffers()),
    )


@dataclass(frozen=True)
class ModelSizes(BackboneSizes):
    """Everything about a `GridModel` that memory and time depend on."""

    flashar: bool
    """Whether there is a vertical branch."""
    branch_layer: int
    """m; L for a raster model."""
    vertical_layers: int
    """k; 0 for a raster model."""
    gated: bool
    corner: Corner

    @property
    def dim(self) -> int:
        """D."""
        return self.block.dim

    @property
    def prefix(self) -> int:
        """Usual number of prefix positions."""
        return self.conditioning.positions

    @property
    def gate_width(self) -> int:
        """Hidden width of the gate (Eq. 7)."""
        return max(64, self.dim // 8)

    def parameters(self) -> dict[str, int]:
        """Parameters by role, in the order of `ROLES`; a role the model lacks has 0."""
        gate = 2 * self.dim * self.gate_width + self.gate_width + 1
        counts = {
            "backbone": self.embedding_parameters + self.n_layer * self.block_parameters + self.norm_parameters,
            "horizontal_head": self.head_rows * self.dim,
            "vertical": self.flashar * (self.vertical_layers * self.block_parameters + self.norm_parameters),
            "vertical_head": self.flashar * self.head_rows * self.dim,
            "gate": self.gated * gate,
        }
        assert tuple(counts) == ROLES
        return counts

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters().values())


def model_sizes(config: dict[str, Any]) -> ModelSizes:
    """Sizes of the model that `GridModel.config()` describes; its "backbone" may also be {"preset": name, ...}.

    branch_layer: where it is absent, the one that is usual for the backbone.

    Raises:
        ValueError: unknown kind, preset or field; a branch layer outside the model.
    """
    found = vars(_backbone_sizes(json.dumps(config["backbone"])))
    n_layer = found["n_layer"]
    kind = config.get("kind", "flashar")
    if kind == "raster":
        return ModelSizes(
            **found, flashar=False, branch_layer=n_layer, vertical_layers=0, gated=False, corner="horizontal"
        )
    if kind != "flashar":
        raise ValueError(f'model kind is {kind!r}; expected "raster" or "flashar".')
    m, k = config.get("branch_layer"), config.get("vertical_layers")
    m = max(0, n_layer - found["usual_clones"]) if m is None else m
    if not 0 <= m <= n_layer:
        raise ValueError(f"branch_layer is {m}; expected 0 to {n_layer} (the number of layers).")
    return ModelSizes(
        **found,
        flashar=True,
        branch_layer=m,
        vertical_layers=n_layer - m if k is None else k,
        gated=config.get("fusion", "gate") == "gate",
        corner=config.get("corner", "horizontal"),
    )
