"""Captions of shards as what a model that takes prompts is conditioned on."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor

from flashar_pl.checkpoints.hub import prompt_tokenizer
from flashar_pl.tokenizers.prompts import MAX_PROMPT


class PromptEncoder:
    """Caption -> 1-D int64 token ids of the whole prefix: template, caption, image begin, size digits, image token.

    A `<|...|>` inside a caption is plain text. Longer prompts than `max_length` tokens (template included) lose the
    end of their caption, never of the template; the first one of every process is announced by a UserWarning.
    """

    def __init__(self, assets: str | Path, grid: tuple[int, int], max_length: int = MAX_PROMPT) -> None:
        """assets: directory with the tokenizer of prompts, such as a model's own.

        Raises ValueError where a file is missing or damaged, what reads it is not installed, or the limit leaves no
        room.
        """
        self.text = prompt_tokenizer(assets).for_grid(grid)
        self.header = self.text.image_prefix(*grid)
        self.max_length = max_length
        self.truncated = 0
        """Captions cut so far in this process."""
        least = len(self.text.prompt("")) + 1
        if max_length < least:
            raise ValueError(f"max_prompt is {max_length}; expected at least {least}, the template and one token.")

    def for_grid(self, grid: tuple[int, int]) -> PromptEncoder:
        """The same encoder for images of another grid (H, W); the tokenizer's tables are shared."""
        other = copy.copy(self)
        other.text = self.text.for_grid(grid)
        other.header = self.text.image_prefix(*grid)
        return other

    def __call__(self, caption: str) -> Tensor:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ids = self.text.prompt(caption, max_length=self.max_length, too_long="truncate")
        self.truncated += len(said)
        if said and self.truncated == 1:
            warnings.warn(f"{said[0].message} Other captions that are too long are cut without a word.", stacklevel=2)
        return torch.cat([ids, self.header])
