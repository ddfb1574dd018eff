"""Raster autoregressive transformers that FlashAR adapts."""

from flashar_pl.backbones.base import Backbone
from flashar_pl.backbones.condition import (
    Batch,
    ClassIds,
    Condition,
    Conditioning,
    Prefix,
    Prompts,
    TextFeatures,
    as_condition,
)
from flashar_pl.backbones.emu35 import Emu35, Emu35Config
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.backbones.registry import (
    build_backbone,
    complete,
    describe_backbone,
    examples,
    home_of,
    import_backbone,
    presets,
    register_backbone,
)

__all__ = [
    "Backbone",
    "Batch",
    "ClassIds",
    "Condition",
    "Conditioning",
    "Emu35",
    "Emu35Config",
    "LlamaGen",
    "LlamaGenConfig",
    "Prefix",
    "Prompts",
    "TextFeatures",
    "as_condition",
    "build_backbone",
    "complete",
    "describe_backbone",
    "examples",
    "home_of",
    "import_backbone",
    "presets",
    "register_backbone",
]
