"""Image tokenizers (images <-> codes), and the tokenizer of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flashar_pl.console import closest
from flashar_pl.tokenizers.base import Tokenizer
from flashar_pl.tokenizers.hub_vq import HubVQ, holds_vq
from flashar_pl.tokenizers.ibq import IBQ
from flashar_pl.tokenizers.multi_scale_vq import MultiScaleVQ
from flashar_pl.tokenizers.pixels import PixelTokenizer
from flashar_pl.tokenizers.prompts import PromptTokenizer
from flashar_pl.tokenizers.scenes import SceneTokenizer
from flashar_pl.tokenizers.text import Emu35Text
from flashar_pl.tokenizers.vq16 import VQ16

__all__ = [
    "IBQ",
    "VQ16",
    "Emu35Text",
    "MultiScaleVQ",
    "PixelTokenizer",
    "PromptTokenizer",
    "Tokenizer",
    "build_tokenizer",
]


def _in_directory(weights: str | Path | None = None, **options: Any) -> Tokenizer:
    """A directory that is given without a kind: of a model with an image tokenizer, or Emu3.5's."""
    if weights is not None and not options and holds_vq(weights):
        return HubVQ.from_directory(weights)
    return IBQ.from_files(weights, **options)


KINDS: dict[str, tuple[Callable[..., Tokenizer], tuple[str, ...]]] = {
    "pixels": (PixelTokenizer, ("levels",)),
    "scenes": (SceneTokenizer, ()),
    "vq16": (partial(VQ16.from_file, kind="vq16"), ("weights", "decode_dtype")),
    "vq8": (partial(VQ16.from_file, kind="vq8"), ("weights", "decode_dtype")),
    "multi_scale_vq": (MultiScaleVQ.from_file, ("weights", "patch_nums", "decode_dtype")),
    "ibq": (_in_directory, ("weights", "settings", "decode_dtype")),
    "hub": (HubVQ.from_directory, ("weights",)),
}
"""Kind -> (constructor, keys a config may have)."""


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `config` describes, the inverse of `Tokenizer.config()`.

    `{"kind": "pixels", "levels": 17}`, `{"kind": "scenes"}`, `{"kind": "vq16" | "vq8", "weights": FILE}`, `{"kind":
    "multi_scale_vq", "weights": FILE, "patch_nums": LIST or None}`, `{"kind": "ibq", "weights": FILE or DIRECTORY,
    "settings": FILE or None}`; those with weights also take "decode_dtype": "float32" | "bfloat16".
    `{"kind": "hub", "weights": DIRECTORY}`: that of a model in transformers' format.
    Raises ValueError for an unknown kind or key, a missing key, and a weights file that is missing or unsuitable.
    """
    if "kind" not in config:
        raise ValueError(f"tokenizer config {dict(config)} has no 'kind'; expected one of {', '.join(KINDS)}.")
    kind = str(config["kind"])
    if kind not in KINDS:
        raise ValueError(f"tokenizer kind {kind!r} is unknown; {closest(kind, KINDS)}")
    build, allowed = KINDS[kind]
    options = {key: value for key, value in config.items() if key != "kind"}
    for key in options:
        if key not in allowed:
            raise ValueError(f"tokenizer {kind!r} has no setting {key!r}; {closest(key, allowed)}")
    return build(**options)
