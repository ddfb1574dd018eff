"""What turns prompts into token ids, whatever files it reads.

Shapes: n tokens of a prompt, template included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

MAX_PROMPT = 4096
"""Default limit of a prompt's tokens; the rest of a model's positions is for the image."""


class PromptTokenizer(ABC):
    """Prompts to token ids, with the template of a model. Special tokens inside a user's text are plain text."""

    def for_grid(self, grid: tuple[int, int]) -> Self:
        """The same for images of H x W codes, where the template says their size."""
        return self

    @abstractmethod
    def check_vocabulary(self, size: int, visual_token_offset: int | None) -> None:
        """ValueError unless a model of `size` tokens, whose codes begin at an offset (None = they do not follow one
        another), was trained with this tokenizer."""

    @abstractmethod
    def prompt(
        self, text: str, *, max_length: int = MAX_PROMPT, too_long: Literal["error", "truncate"] = "error"
    ) -> Tensor:
        """(n,) int64 ids of the template around `text`, n <= max_length.

        A longer prompt raises ValueError; with too_long="truncate" the end of the text is cut (never inside a
        character), the template stays whole, and a UserWarning says what was left out.
        """

    @abstractmethod
    def unconditional(self, style: Literal["official", "released"] = "official") -> Tensor:
        """(n,) int64 ids of the prompt that guidance leads away from."""

    @abstractmethod
    def image_prefix(self, height: int, width: int) -> Tensor:
        """int64 ids that open an image of height x width codes."""

    def conditions(self, prompts: Sequence[str], grid: tuple[int, int]) -> list[Tensor]:
        """The whole prefix of each prompt: `prompt`, then `image_prefix`."""
        own, opening = self.for_grid(grid), self.image_prefix(*grid)
        return [torch.cat([own.prompt(text), opening]) for text in prompts]


def too_many(n: int, limit: int, text: str) -> ValueError:
    """The error for a prompt of n tokens."""
    return ValueError(
        f"the prompt takes {n} tokens with its template, {n - limit} more than the limit of {limit}: "
        f"'{shortened(text)}'. Shorten it, raise max_length, or pass too_long='truncate'."
    )


def cut_off(n: int, limit: int, lost: int, text: str) -> str:
    """The warning for a prompt of n tokens that lost its last ones. text: of those."""
    return (
        f"the prompt takes {n} tokens, the limit is {limit}: the last {lost} tokens of its text were left out: "
        f"'{shortened(text)}'."
    )


def shortened(text: str, limit: int = 60) -> str:
    """A text for a message."""
    return text if len(text) <= limit else text[:limit] + "..."
