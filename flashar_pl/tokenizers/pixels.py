"""Grey levels as codes: the tokenizer of the digits demonstration, exact in both directions.

Shapes: B images of h x w pixels; one code per pixel, so H = h and W = w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashar_pl.tokenizers.base import Tokenizer


class PixelTokenizer(Tokenizer):
    """Code c is the grey value round(255 c / (levels - 1)); an image's code is the level nearest to its mean channel.

    `encode(decode(codes)) == codes` for every number of levels from 2 to 256: the grey value of a level is rounded by
    at most 1/2, which is less than half the distance to the next level.
    """

    greys: Tensor

    def __init__(self, levels: int | None = None) -> None:
        """Raises ValueError unless 2 <= levels <= 256."""
        super().__init__()
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
            raise ValueError(f"levels is {levels!r}; expected a whole number from 2 to 256 (17 for the digits).")
        self.vocabulary = levels
        self.downsample = 1
        greys = torch.tensor([round(255 * c / (levels - 1)) for c in range(levels)], dtype=torch.uint8)
        self.register_buffer("greys", greys, persistent=False)  # (levels,)

    def config(self) -> dict[str, Any]:
        return {"kind": "pixels", "levels": self.vocabulary}

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=False)
        total = images.sum(dim=1, dtype=torch.int64)  # (B, h, w), 0 .. 765
        return (2 * total * (self.vocabulary - 1) + 765) // 1530  # round(total / 765 * (levels - 1)), halves upwards

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        grey = self.greys[codes]  # (B, H, W)
        return grey[:, None].repeat(1, 3, 1, 1)  # (B, 3, h, w)

    def encode_float(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=True)
        unit = (images.double().mean(dim=1) + 1) / 2  # (B, h, w) in [0, 1]
        return (unit * (self.vocabulary - 1) + 0.5).floor().long().clamp(0, self.vocabulary - 1)

    def decode_float(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        value = codes.float() * (2 / (self.vocabulary - 1)) - 1  # (B, H, W) in [-1, 1]
        return value[:, None].repeat(1, 3, 1, 1)  # (B, 3, h, w)
