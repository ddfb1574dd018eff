"""Raster autoregressive transformers that FlashAR adapts."""

from flashar_pl.backbones.base import Backbone, Batch, Condition, Prefix, TextFeatures
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig

__all__ = ["Backbone", "Batch", "Condition", "LlamaGen", "LlamaGenConfig", "Prefix", "TextFeatures"]
