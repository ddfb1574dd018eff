"""How a family of models writes a prompt, as plain values. Standard library only.

Shapes: H x W codes of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """The text around a user's prompt, special tokens by name. Functions of a module, so that workers can have them."""

    prompt: Callable[[str, int, int], str]
    """Everything before the image, from the user's text, H and W."""
    image: Callable[[int, int], str]
    """What opens an image of H x W codes: its begin token first, then its size where the model is told."""
    special: tuple[str, ...] = ()
    """Special tokens in them, which the tokenizer must have."""
    null: str | None = None
    """What stands in place of `prompt` where guidance leads away from; None = `prompt` without a text."""
    own_start: bool = False
    """Whether the tokenizer puts its own begin token before the text."""
