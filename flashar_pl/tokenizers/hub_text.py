"""Prompts of models in transformers' format: their own tokenizer, and the template of their family.

Shapes: n tokens of a prompt, template included.
"""

from __future__ import annotations

import copy
import re
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from flashar_pl.pretrained import pretrained
from flashar_pl.templates import Template
from flashar_pl.tokenizers.prompts import MAX_PROMPT, PromptTokenizer, cut_off, too_many
from flashar_pl.tokenizers.rank_text import RANKS, RankText

FILES = (RANKS, "tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""One of them is in every directory with a tokenizer that is read here."""


class HubText(PromptTokenizer):
    """Prompts through `transformers.AutoTokenizer`, or MammothModa2's own files.

    A special token in a user's text gets a space after its first character, so that it is plain text.
    """

    def __init__(self, directory: str | Path, template: Template, boi_token_id: int | None = None) -> None:
        """boi_token_id: the token that begins an image, where the template opens none.

        Raises:
            ValueError: no tokenizer in the directory, transformers is not installed, or the tokenizer lacks a special
                token of the template.
        """
        self.name, self.template, self.boi = str(directory), template, boi_token_id
        self.grid = (0, 0)
        self._tokenizer = _load(str(directory))
        self._special = re.compile("|".join(map(re.escape, sorted(self._tokenizer.all_special_tokens))) or r"(?!)")
        for token in template.special:
            if self._encode(token) != [self._tokenizer.convert_tokens_to_ids(token)]:
                raise ValueError(
                    f"the tokenizer at {directory} has no token {token}, which prompts of this model need."
                )

    def for_grid(self, grid: tuple[int, int]) -> Self:
        other = copy.copy(self)
        other.grid = grid
        return other

    def check_vocabulary(self, size: int, visual_token_offset: int | None) -> None:
        ids = [self._tokenizer.convert_tokens_to_ids(token) for token in self.template.special]
        if (highest := max([*ids, self._tokenizer.vocab_size - 1])) >= size:
            raise ValueError(
                f"the tokenizer at {self.name} has token ids up to {highest}, the model {size} tokens; expected the "
                "tokenizer that came with the model's weights."
            )
        if visual_token_offset != (first := getattr(self._tokenizer, "first_code", visual_token_offset)):
            raise ValueError(
                f"the tokenizer at {self.name} has code 0 at token {first}, the model at {visual_token_offset}; "
                "expected the tokenizer that came with the model's weights."
            )

    def prompt(
        self, text: str, *, max_length: int = MAX_PROMPT, too_long: Literal["error", "truncate"] = "error"
    ) -> Tensor:
        text = self._plain(unicodedata.normalize("NFC", text))
        ids = self._around(text)
        if len(ids) <= max_length:
            return torch.tensor(ids, dtype=torch.int64)
        if too_long == "error":
            raise too_many(len(ids), max_length, text)
        kept, cut = text, ids
        while kept and len(cut) > max_length:  # a token is at least a character, or a part of one
            kept = kept[: -max(1, (len(cut) - max_length) // 4)]
            cut = self._around(kept)
        if len(cut) > max_length:
            raise ValueError(f"max_length is {max_length}, but the template alone takes {len(cut)} tokens.")
        warnings.warn(cut_off(len(ids), max_length, len(ids) - len(cut), text[len(kept) :]), stacklevel=2)
        return torch.tensor(cut)

    def unconditional(self, style: Literal["official", "released"] = "official") -> Tensor:
        ids = self._around("") if self.template.null is None else self._encode(self.template.null)
        return torch.tensor(ids, dtype=torch.int64)

    def image_prefix(self, height: int, width: int) -> Tensor:
        opening = self.template.image(height, width)
        if opening:
            return torch.tensor(self._encode(opening))
        return torch.tensor([] if self.boi is None else [self.boi], dtype=torch.int64)

    def _around(self, text: str) -> list[int]:
        """Ids of the template around a text."""
        return self._encode(self.template.prompt(text, *self.grid), self.template.own_start)

    def _encode(self, text: str, start: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=start)

    def _plain(self, text: str) -> str:
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@lru_cache(maxsize=2)
def _load(directory: str) -> Any:
    """A server asks for it at every prompt."""
    if (Path(directory).expanduser() / RANKS).is_file():
        return RankText(directory)
    return pretrained("AutoTokenizer", directory, "the model", "tokenizer of its prompts", extra="hf")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory holds a tokenizer that is read here."""
    return any((Path(directory).expanduser() / name).is_file() for name in FILES)
