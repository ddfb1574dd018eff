"""Sizes of a model, read from one that has no memory for weights.

Letters: L layers, k vertical layers, D width, V codes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from flashar_pl.backbones import Backbone, describe_backbone, import_backbone
from flashar_pl.checkpoints.description import build_on_meta
from flashar_pl.models.base import ROLES, GridModel
from flashar_pl.models.flashar import FlashAR

TEXT = "text_feed_forward"
"""Of a block, the MLP of text alone, where it has one."""
MLP = ("w13", "w2")
"""Its projections."""


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

    @classmethod
    def of(cls, name: str, module: nn.Linear) -> Linear:
        """Sizes of a module."""
        return cls(name, module.in_features, module.out_features)


@dataclass(frozen=True)
class ModelSizes:
    """Everything about a `GridModel` that memory and time depend on."""

    config: dict[str, Any]
    """`GridModel.config()`."""
    model: GridModel
    """Without memory for weights."""
    linears: tuple[Linear, ...]
    """The projections of one block, in the order they run; not those of an MLP of text alone."""
    condition_linears: tuple[Linear, ...]
    """Projections that embed the condition."""
    gate: Linear | None
    """Its hidden layer (Eq. 7)."""
    vertical_layers: int
    """k; 0 for a raster model."""
    flashar: bool
    """Whether there is a vertical branch."""
    head_rows: int
    """Rows of each head, text tokens included: the loss is normalised over them. Decoding reads those of codes only."""
    parameters: dict[str, int]
    """By role, in the order of `ROLES`; a role the model lacks has 0."""
    text_layers: tuple[int, int]
    """Layers of the backbone, and of the vertical branch, where text has an MLP of its own."""
    block_parameters: int
    """Of the largest block."""
    embedding_parameters: int
    """Embeddings of codes, tokens and conditions."""
    buffer_elements: int
    """Constants stored beside the parameters."""

    @property
    def backbone(self) -> Backbone:
        """What knows its blocks, layers (L), codes (V), condition and usual grid."""
        return self.model.backbone

    @property
    def dim(self) -> int:
        """D."""
        return self.backbone.block.dim

    @property
    def block_weights(self) -> int:
        """Weights of the projections of one block."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def mlp(self) -> tuple[Linear, ...]:
        """Those of an MLP."""
        return tuple(linear for linear in self.linears if linear.name in MLP)

    @property
    def mlp_weights(self) -> int:
        """Weights of an MLP."""
        return sum(linear.parameters for linear in self.mlp)

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())


def model_sizes(config: dict[str, Any]) -> ModelSizes:
    """Sizes of the model that `GridModel.config()` describes; its "backbone" may also be {"preset": name, ...}.

    kind: where it is absent, the one that alone can run the backbone, or "flashar". branch_layer: where it is absent,
    the one that is usual for the backbone.

    Raises:
        ValueError: unknown kind, preset or field; a branch layer outside the model.
    """
    return _model_sizes(json.dumps(config))


def named_sizes(preset: str | None, backbone_class: str | None, branch_layer: int | None, **options: Any) -> ModelSizes:
    """Sizes of FlashAR on a published backbone, or on one of the user's with its default sizes; options: changed.

    A backbone that only one kind of model can run gives that model.
    """
    kind = None if backbone_class is None else import_backbone(backbone_class).kind  # its presets are known now
    backbone = {"kind": kind} if preset is None else {"preset": preset}
    return model_sizes(
        {"backbone": backbone | options, **({} if branch_layer is None else {"branch_layer": branch_layer})}
    )


@lru_cache(maxsize=32)
def _model_sizes(text: str) -> ModelSizes:
    config = json.loads(text)
    described = describe_backbone(config["backbone"])
    config.setdefault("kind", described.own_model or "flashar")
    if config["kind"] == "flashar" and config.get("branch_layer") is None:
        config["branch_layer"] = max(0, described.n_layer - described.usual_clones)
    model = build_on_meta(config)
    backbone, head, config = model.backbone, model.dual_head, model.config()
    block, roles, parameters = backbone.blocks[0], model.roles(), dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        parameters[roles[name]] += parameter.numel()
    of_condition = backbone.condition_linears()
    inner = [(name.split(".")[-1], module) for name, module in block.named_modules()
             if isinstance(module, nn.Linear) and module not in of_condition.values() and TEXT not in name]  # fmt: skip
    cloned = [block for branch in model.branches for block in branch.blocks] if isinstance(model, FlashAR) else []
    branches = (backbone.blocks, cloned)
    of_text = [sum(getattr(each, TEXT, None) is not None for each in blocks) for blocks in branches]
    return ModelSizes(
        config=config,
        model=model,
        linears=tuple(Linear.of(name, module) for name, module in inner),
        condition_linears=tuple(Linear.of(name, module) for name, module in of_condition.items()),
        gate=None if head.gate is None else Linear.of("gate", head.gate.hidden),
        vertical_layers=len(cloned),
        flashar=head.vertical is not None,
        head_rows=head.horizontal.out_features,
        parameters=parameters,
        text_layers=(of_text[0], of_text[1]),
        block_parameters=max(map(count, backbone.blocks)),
        embedding_parameters=parameters["backbone"] - count(backbone.blocks) - count(backbone.norm),
        buffer_elements=sum(buffer.numel() for buffer in model.buffers()),
    )


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
