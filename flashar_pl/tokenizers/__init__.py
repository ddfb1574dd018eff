"""Image tokenizers (images <-> codes), and the tokenizer of prompts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashar_pl.tokenizers.base import Tokenizer
from flashar_pl.tokenizers.ibq import IBQ
from flashar_pl.tokenizers.pixels import PixelTokenizer
from flashar_pl.tokenizers.text import RANK_FILE, Emu35Text
from flashar_pl.tokenizers.vq16 import VQ16

__all__ = [
    "IBQ",
    "VQ16",
    "Emu35Text",
    "PixelTokenizer",
    "PromptTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "find_prompt_tokenizer",
]

PromptTokenizer = Emu35Text
"""Turns prompts and grids into token ids: the one there is, whatever backbone takes them."""


def _vq16(weights: str | None = None, **options: Any) -> VQ16:
    return VQ16.from_file(weights, kind="vq16", **options)


def _vq8(weights: str | None = None, **options: Any) -> VQ16:
    return VQ16.from_file(weights, kind="vq8", **options)


def _ibq(weights: str | None = None, **options: Any) -> IBQ:
    return IBQ.from_files(weights, **options)


KINDS: dict[str, tuple[Callable[..., Tokenizer], tuple[str, ...], tuple[str, ...]]] = {
    "pixels": (PixelTokenizer, ("levels",), ("levels",)),
    "vq16": (_vq16, ("weights", "decode_dtype"), ()),
    "vq8": (_vq8, ("weights", "decode_dtype"), ()),
    "ibq": (_ibq, ("weights", "settings", "decode_dtype"), ()),
}
"""Kind -> (constructor, keys a config may have, keys it must have)."""


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `config` describes, the inverse of `Tokenizer.config()`.

    `{"kind": "pixels", "levels": 17}`, `{"kind": "vq16" | "vq8", "weights": FILE}`, `{"kind": "ibq", "weights": FILE
    or DIRECTORY, "settings": FILE or None}`; the last three also take "decode_dtype": "float32" | "bfloat16".
    Raises ValueError for an unknown kind or key, a missing key, and a weights file that is missing or unsuitable.
    """
    if "kind" not in config:
        raise ValueError(f"tokenizer config {dict(config)} has no 'kind'; expected one of {', '.join(KINDS)}.")
    kind = str(config["kind"])
    if kind not in KINDS:
        raise ValueError(f"tokenizer kind {kind!r} is unknown; {_closest(kind, KINDS)}.")
    build, allowed, required = KINDS[kind]
    options = {key: value for key, value in config.items() if key != "kind"}
    for key in options:
        if key not in allowed:
            raise ValueError(f"tokenizer {kind!r} has no setting {key!r}; {_closest(key, allowed)}.")
    for key in required:
        if key not in options:
            raise ValueError(f"tokenizer {kind!r} needs the setting {key!r}; got {dict(config)}.")
    return build(**options)


def _closest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.4)
    known = ", ".join(choices)
    return f"did you mean {close[0]!r}? Known: {known}" if close else f"known: {known}"


def find_prompt_tokenizer(directory: str | Path) -> PromptTokenizer | None:
    """The tokenizer of prompts whose files lie in a directory; None where none does."""
    folder = Path(directory).expanduser()
    return PromptTokenizer.from_directory(folder) if (folder / RANK_FILE).is_file() else None
