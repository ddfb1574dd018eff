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
)
from flashar_pl.backbones.decoder import Decoder, from_transformers
from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.emu35 import Emu35, Emu35Config
from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.backbones.registry import (
    build_backbone,
    describe_backbone,
    import_backbone,
    register_backbone,
)
