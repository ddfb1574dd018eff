"""Directories of models as transformers saves them: config.json, safetensors files, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flashar_pl.backbones.decoder import Decoder
from flashar_pl.backbones.decoder_config import DecoderConfig, Heads
from flashar_pl.backbones.families import Family, find_family
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory
from flashar_pl.checkpoints.transformers import LanguageModel, known_family
from flashar_pl.models.raster import RasterAR
from flashar_pl.renames import build_filled
from flashar_pl.templates import Template
from flashar_pl.text_files import naming, read_json
from flashar_pl.tokenizers.hub_text import HubText, has_tokenizer
from flashar_pl.tokenizers.hub_vq import PART, holds_vq
from flashar_pl.tokenizers.prompts import PromptTokenizer
from flashar_pl.tokenizers.rank_text import RANKS, read_files
from flashar_pl.tokenizers.text import ADVICE, RANK_FILE, Emu35Text


class HubDirectory(SafetensorsDirectory):
    """A directory whose model_type, or first of architectures, is that of a family of `backbones.families`."""

    kind = Decoder.kind
    """Of its backbone."""
    released = False

    def __init__(self, directory: str | Path) -> None:
        """Raises ValueError where files are missing, or no family reads them."""
        self.values = hub_values(Path(directory))
        super().__init__(directory)

    def language_model(self, heads: Heads) -> LanguageModel:
        """Its tensors. Raises ValueError as `LanguageModel` does, and where it is not known which tokens are codes."""
        model = LanguageModel(self, self.values, heads)
        if not model.config.has_codes:
            raise ValueError(
                f"{self.name}/config.json does not say which tokens are codes; add visual_token_offset (token id of "
                "code 0) and num_visual_codes to it, and, where rows end with a token, eol_token_id."
            )
        return model

    def config(self, heads: Heads) -> DecoderConfig:
        """Of the backbone."""
        return self.language_model(heads).config

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """Argument of `build_tokenizer`, where the model's image tokenizer is in the same files."""
        own = any(f".{PART}" in f".{key}" for key in self.keys())
        return {"kind": "hub", "weights": self.name} if own and holds_vq(self.name) else None

    def read(self, heads: Heads, device: torch.device | str, dtype: torch.dtype | None) -> RasterAR:
        """The raster model, read tensor by tensor into memory of `device`; dtype None = that of the files."""
        source = self.language_model(heads)
        backbone = build_filled(
            lambda: Decoder(source.config), source, source.renames(), device, dtype, source.beside
        )  # fmt: skip
        return RasterAR(backbone)


def hub_values(directory: Path) -> dict[str, Any]:
    """config.json, with what generation_config.json and the special tokens of the tokenizer add to it."""
    values = read_json(directory / "config.json")
    family = find_family(values)
    if family is None:
        return values
    found: dict[str, Any] = {}
    if family.tokens or family.codes_after_text:
        ids = _token_ids(directory)
        found = {field: ids[token] for field, token in family.tokens.items() if token in ids}
        if family.codes_after_text and ids:
            found |= {"visual_token_offset": max(ids.values()) + 1, "num_visual_codes": family.codes_after_text}
    places = directory / "t2i_generation_config.json"
    if places.is_file():  # MammothModa2's
        drawn = read_json(places)
        begin, end = (drawn.get(f"visual_token_{side}_id") for side in ("start", "end"))
        if isinstance(begin, int) and isinstance(end, int):
            found |= {"visual_token_offset": begin, "num_visual_codes": end - begin}
        found |= {key: drawn[key] for key in ("eol_token_id",) if key in drawn}
    drawing = directory / "generation_config.json"
    if drawing.is_file():
        given = read_json(drawing).get("generation_kwargs")
        found |= {} if not isinstance(given, dict) else {k: v for k, v in given.items() if k in family.tokens}
    return {**found, **values}


def preview_of(directory: str | Path) -> Callable[[int, int], tuple[int, int] | None]:
    """What gives the grid of the preview of an image of H x W codes, by a model's directory; None = it has none."""
    values = hub_values(Path(directory).expanduser())
    return known_family(values).config(values).preview


def _token_ids(directory: Path) -> dict[str, int]:
    """Token -> id, of tokenizer.json or of MammothModa2's files; empty where there are none."""
    if (directory / RANKS).is_file():
        return read_files(directory)[1]
    file = directory / "tokenizer.json"
    if not file.is_file():
        return {}
    stored = read_json(file)
    with naming(file):
        words = (stored.get("model") or {}).get("vocab") or {}
        ids = dict(words) if isinstance(words, dict) else {word[0]: i for i, word in enumerate(words)}
        return ids | {str(token["content"]): int(token["id"]) for token in stored.get("added_tokens") or []}


# --- prompts ---------------------------------------------------------------------------------------------------------


def find_prompt_tokenizer(directory: str | Path) -> PromptTokenizer | None:
    """What turns prompts into ids, by the files of a directory; None where they are not there."""
    folder = Path(directory).expanduser()
    if (folder / RANK_FILE).is_file():
        return Emu35Text.from_directory(folder)
    if not (folder / "config.json").is_file() or not has_tokenizer(folder):
        return None
    values = hub_values(folder)
    family = find_family(values)
    return None if family is None else HubText(folder, template_of(family), values.get("boi_token_id"))


def prompt_tokenizer(directory: str | Path) -> PromptTokenizer:
    """The same. Raises ValueError where the files are not there."""
    found = find_prompt_tokenizer(directory)
    if found is None:
        folder = Path(directory).expanduser()
        if (folder / "config.json").is_file() and has_tokenizer(folder):
            known_family(read_json(folder / "config.json"))
        raise ValueError(f"{folder} has neither {RANK_FILE} nor a model's config.json and its tokenizer. {ADVICE}")
    return found


def template_of(family: Family) -> Template:
    """How prompts of a family are written; without a template of its own, as the user types them."""
    return family.template or Template(_as_typed, _no_size, own_start=True)


def _as_typed(text: str, height: int, width: int) -> str:
    return text


def _no_size(height: int, width: int) -> str:
    return ""
