"""What every image tokenizer is to the rest of the package.

Shapes: B images of h x w pixels, H = h / downsample rows and W = w / downsample columns of codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from flashar_pl.options import PixelDtype

GREY = 128
"""Of what is not drawn yet."""


class Tokenizer(nn.Module, ABC):
    """Turns images into a grid of codes and back. Frozen: nothing here is ever trained.

    `encode` / `decode` work on uint8 images, `encode_float` / `decode_float` on values in [-1, 1].
    """

    vocabulary: int
    """Number of codes; codes are 0 .. vocabulary - 1."""
    downsample: int
    """Pixels per code along each side."""
    decodes: bool = True
    """Whether it turns codes into images."""
    decode_dtype: str = "float32"
    """What it decodes in; "bfloat16" is the other one, where a tokenizer has it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which `build_tokenizer` builds the same tokenizer."""

    @abstractmethod
    def encode_float(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) floating point in [-1, 1] to codes (B, H, W) int64."""

    @abstractmethod
    def decode_float(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W) int64 to images (B, 3, h, w) float32, nominally in [-1, 1], not clamped."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) uint8 RGB to codes (B, H, W) int64. Sides must be multiples of `downsample`."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W) int64 to images (B, 3, h, w) uint8 RGB."""

    def decode_in(self, dtype: PixelDtype | None) -> None:
        """Sets `decode_dtype`; None: what is best on the device that the tokenizer is on, see `PixelOptions`.

        Raises ValueError for bf16, with a tokenizer that has one way to decode.
        """
        if dtype == "bf16":
            raise ValueError(f"pixel_dtype is bf16, which {type(self).__name__} does not have; leave it out.")

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the images of a grid (H, W) of codes."""
        return grid[0] * self.downsample, grid[1] * self.downsample

    def decode_partial(self, codes: Tensor) -> Tensor:
        """As `decode`, grey where a code is -1: not drawn yet."""
        missing = (codes < 0).repeat_interleave(self.downsample, 1).repeat_interleave(self.downsample, 2)
        return self.decode(codes.clamp(min=0)).masked_fill(missing[:, None], GREY)

    def check_decodes(self, advice: str = "generate draws codes alone with --codes-only") -> None:
        """Raises ValueError unless codes can be turned into images; advice: what to do then."""
        if not self.decodes:
            raise ValueError(f"this image tokenizer has no decoder in transformers; {advice}.")

    def check_images(self, images: Tensor, floating: bool) -> None:
        """Raises ValueError unless `images` is a batch this tokenizer can encode."""
        expected = "floating point in [-1, 1]" if floating else "uint8"
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, h, w), channels RGB.")
        if images.is_floating_point() != floating or (not floating and images.dtype != torch.uint8):
            other = "encode" if floating else "encode_float"
            raise ValueError(f"images is {images.dtype}; expected {expected} here ({other} takes the other kind).")
        height, width = images.shape[-2:]
        f = self.downsample
        if height % f or width % f or not height or not width:
            raise ValueError(
                f"images are {height} x {width} pixels; both sides must be multiples of {f}. "
                f"Resize or crop to {max(height // f, 1) * f} x {max(width // f, 1) * f}."
            )

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError unless `codes` is (B, H, W) int64 with values below `vocabulary`."""
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes is {tuple(codes.shape)} {codes.dtype}; expected (B, H, W) int64.")
        if not codes.numel():
            return
        low, high = (int(x) for x in codes.aminmax())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"codes lie in {low} .. {high}; this tokenizer has codes 0 .. {self.vocabulary - 1}. "
                "Were they made by another tokenizer, or is an id offset still on them?"
            )
