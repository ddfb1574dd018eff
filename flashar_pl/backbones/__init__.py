"""Raster autoregressive transformers that FlashAR adapts."""

from typing import Any

from flashar_pl.backbones.base import Backbone, Batch, Condition, Prefix, TextFeatures
from flashar_pl.backbones.emu35 import Emu35, Emu35Config
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig

__all__ = [
    "Backbone",
    "Batch",
    "Condition",
    "Emu35",
    "Emu35Config",
    "LlamaGen",
    "LlamaGenConfig",
    "Prefix",
    "TextFeatures",
    "build_backbone",
]


def build_backbone(config: dict[str, Any]) -> Backbone:
    """The backbone that `Backbone.config_dict()` describes, with new weights."""
    values = dict(config)
    kind = values.pop("kind", None)
    if kind == LlamaGen.kind:
        return LlamaGen(LlamaGenConfig(**values))
    if kind == Emu35.kind:
        return Emu35(Emu35Config(**values))
    raise ValueError(f'backbone kind is {kind!r}; expected "{LlamaGen.kind}" or "{Emu35.kind}".')
