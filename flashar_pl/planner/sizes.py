"""Sizes of a model, from its configuration alone: no weights, no module.

Letters: L layers, m branch layer, k vertical layers, D width, A query heads, G key/value heads, E head width,
F feed-forward width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashar_pl.backbones import Conditioning, emu35, llamagen
from flashar_pl.backbones.emu35 import Emu35, Emu35Config
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.layers.transformer import BlockConfig
from flashar_pl.models.base import ROLES
from flashar_pl.models.dual_head import Corner

BackboneConfig = LlamaGenConfig | Emu35Config


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
class ModelSizes:
    """Everything about a `GridModel` that memory and time depend on."""

    backbone: BackboneConfig
    flashar: bool
    """Whether there is a vertical branch."""
    branch_layer: int
    """m; L for a raster model."""
    vertical_layers: int
    """k; 0 for a raster model."""
    gated: bool
    corner: Corner

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        return self.backbone.block

    @property
    def dim(self) -> int:
        """D."""
        return self.backbone.dim

    @property
    def n_layer(self) -> int:
        """L."""
        return self.backbone.n_layer

    @property
    def vocabulary(self) -> int:
        """V, the codes that can be drawn: decoding reads these rows of a head only."""
        return self.backbone.n_codes if isinstance(self.backbone, Emu35Config) else self.backbone.vocab_size

    @property
    def head_rows(self) -> int:
        """Rows of each head, text tokens included: the loss is normalised over them."""
        return self.backbone.head_rows if isinstance(self.backbone, Emu35Config) else self.backbone.vocab_size

    @property
    def row_ends(self) -> bool:
        """Whether the raster plan has forced row-end tokens."""
        return isinstance(self.backbone, Emu35Config)

    @property
    def prefix(self) -> int:
        """Prefix positions: class token, caption positions, or 50, a usual Emu3.5 prompt."""
        if isinstance(self.backbone, Emu35Config):
            return 50
        return 1 if self.backbone.condition == "class" else self.backbone.caption_positions

    @property
    def conditioning(self) -> Conditioning:
        """What the model is conditioned on."""
        return self.backbone.conditioning

    @property
    def condition_linears(self) -> tuple[Linear, ...]:
        """Projections that embed the condition (captions only)."""
        if isinstance(self.backbone, LlamaGenConfig) and self.backbone.condition == "text":
            return (
                Linear("fc1", self.backbone.caption_dim, self.dim),
                Linear("fc2", self.dim, self.dim),
            )
        return ()

    @property
    def gate_width(self) -> int:
        """Hidden width of the gate (Eq. 7)."""
        return max(64, self.dim // 8)

    @property
    def block_parameters(self) -> int:
        """One block: projections, two norms, and with qk-norm two more of head width."""
        norms = 2 * self.dim + (2 * self.block.head_dim if self.block.qk_norm else 0)
        return sum(linear.parameters for linear in block_linears(self.block)) + norms

    @property
    def embedding_parameters(self) -> int:
        """Code (or token) and condition embeddings."""
        table = self.backbone.vocab_size * self.dim
        if isinstance(self.backbone, LlamaGenConfig) and self.backbone.condition == "class":
            table += (self.backbone.num_classes + 1) * self.dim
        return table + sum(linear.parameters for linear in self.condition_linears)

    @property
    def buffer_elements(self) -> int:
        """Constants stored beside the parameters: the null caption."""
        if isinstance(self.backbone, LlamaGenConfig) and self.backbone.condition == "text":
            return self.backbone.caption_positions * self.backbone.caption_dim
        return 0

    def parameters(self) -> dict[str, int]:
        """Parameters by role, in the order of `ROLES`; a role the model lacks has 0."""
        gate = 2 * self.dim * self.gate_width + self.gate_width + 1
        counts = {
            "backbone": self.embedding_parameters + self.n_layer * self.block_parameters + self.dim,
            "horizontal_head": self.head_rows * self.dim,
            "vertical": self.flashar * (self.vertical_layers * self.block_parameters + self.dim),
            "vertical_head": self.flashar * self.head_rows * self.dim,
            "gate": self.gated * gate,
        }
        assert tuple(counts) == ROLES
        return counts

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters().values())


def backbone_config(values: dict[str, Any]) -> BackboneConfig:
    """The backbone's configuration from a dictionary: every field under "kind", or "preset" with changed fields.

    Raises:
        ValueError: unknown kind, preset or field.
    """
    values = dict(values)
    if (name := values.pop("preset", None)) is not None:
        values.pop("kind", None)
        return emu35.preset(name, **values) if name in emu35.PRESETS else _llamagen_preset(name, values)
    kind = values.pop("kind", LlamaGen.kind)
    if kind not in (LlamaGen.kind, Emu35.kind):
        raise ValueError(f"backbone kind is {kind!r}; expected {LlamaGen.kind!r} or {Emu35.kind!r}.")
    family = LlamaGenConfig if kind == LlamaGen.kind else Emu35Config
    try:
        return family(**values)
    except TypeError as error:
        raise ValueError(f"a {kind} backbone cannot be made from {', '.join(values) or 'nothing'}: {error}") from error


def _llamagen_preset(name: str, values: dict[str, Any]) -> LlamaGenConfig:
    if name not in llamagen.PRESETS:
        known = ", ".join([*llamagen.PRESETS, *emu35.PRESETS])
        raise ValueError(f"no preset {name!r}; expected one of {known}.")
    return llamagen.preset(name, **values)


def model_sizes(config: dict[str, Any]) -> ModelSizes:
    """Sizes of the model that `GridModel.config()` describes; its "backbone" may also be {"preset": name, ...}.

    Raises:
        ValueError: unknown kind, preset or field; a branch layer outside the model.
    """
    values = dict(config)
    kind = values.pop("kind", "flashar")
    if kind not in ("raster", "flashar"):
        raise ValueError(f'model kind is {kind!r}; expected "raster" or "flashar".')
    backbone = backbone_config(values.pop("backbone"))
    if kind == "raster":
        return ModelSizes(backbone, False, backbone.n_layer, 0, False, "horizontal")
    m = values.get("branch_layer")
    if m is None:
        m = default_branch_layer(backbone)
    if not 0 <= m <= backbone.n_layer:
        raise ValueError(f"branch_layer is {m}; expected 0 to {backbone.n_layer} (the number of layers).")
    k = values.get("vertical_layers")
    return ModelSizes(
        backbone=backbone,
        flashar=True,
        branch_layer=m,
        vertical_layers=backbone.n_layer - m if k is None else k,
        gated=values.get("fusion", "gate") == "gate",
        corner=values.get("corner", "horizontal"),
    )


def default_branch_layer(backbone: BackboneConfig) -> int:
    """L - 1 for LlamaGen (the paper), L - 4 for Emu3.5 (the released model clones four layers)."""
    return max(0, backbone.n_layer - (4 if isinstance(backbone, Emu35Config) else 1))
