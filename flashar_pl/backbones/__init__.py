"""Raster autoregressive transformers that FlashAR adapts."""

from collections.abc import Callable
from typing import Any

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
    "register_backbone",
]

_BUILDERS: dict[str, Callable[..., Backbone]] = {
    LlamaGen.kind: lambda **values: LlamaGen(LlamaGenConfig(**values)),
    Emu35.kind: lambda **values: Emu35(Emu35Config(**values)),
}


def register_backbone(kind: str, build: Callable[..., Backbone]) -> None:
    """Let checkpoints of another backbone be read in this process: `build(**values)` makes one with new weights.

    values: what its `config_dict()` holds beside "kind". Raises ValueError where the kind is taken.
    """
    if _BUILDERS.setdefault(kind, build) is not build:
        raise ValueError(f"backbone kind {kind!r} is taken; expected another name than {', '.join(_BUILDERS)}.")


def build_backbone(config: dict[str, Any]) -> Backbone:
    """The backbone that `Backbone.config_dict()` describes, with new weights."""
    values = dict(config)
    kind = values.pop("kind", None)
    if kind not in _BUILDERS:
        raise ValueError(
            f"backbone kind is {kind!r}; expected one of {', '.join(_BUILDERS)}, or one of your own after "
            "flashar_pl.backbones.register_backbone."
        )
    return _BUILDERS[kind](**values)
