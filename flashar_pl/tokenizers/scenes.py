"""Patches of drawn objects as codes: the tokenizer of the scenes, exact in both directions.

An object is 2 x 2 patches, drawn in one colour on white: every shape and colour has four codes, one for each quarter.
Code 0 is the empty patch.

Shapes: B images of h x w pixels, H = h / 6 rows and W = w / 6 columns of codes, V codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.tokenizers.base import Tokenizer

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 39, 40),
    "yellow": (240, 200, 30),
    "green": (44, 140, 60),
    "blue": (31, 90, 200),
    "purple": (140, 70, 180),
    "black": (30, 30, 30),
}
"""Names, which are among GenEval's, and RGB."""
PATCH = 6
"""Pixels along each side."""
QUARTERS = 4
"""Codes of an object: top left, top right, bottom left, bottom right."""
VOCABULARY = 1 + len(SHAPES) * len(COLORS) * QUARTERS


def first_code(shape: int, color: int) -> int:
    """The code of an object's top left quarter; the other three follow."""
    return 1 + QUARTERS * (shape * len(COLORS) + color)


def draw_patches() -> np.ndarray:
    """(V, 3, 6, 6) uint8: the picture of every code."""
    side = 2 * PATCH
    y, x = np.mgrid[:side, :side] - (side - 1) / 2  # of pixel centres, from the object's centre
    masks = (
        x**2 + y**2 <= (PATCH - 0.5) ** 2,
        np.maximum(abs(x), abs(y)) <= PATCH - 1.5,
        (2 * abs(x) <= y + PATCH - 0.5) & (y <= PATCH - 1.5),
    )
    patches = np.full((VOCABULARY, 3, PATCH, PATCH), 255, np.uint8)
    for shape, mask in enumerate(masks):
        for color, rgb in enumerate(COLORS.values()):
            picture = np.where(mask, np.reshape(rgb, (3, 1, 1)), 255)  # (3, 12, 12)
            quarters = picture.reshape(3, 2, PATCH, 2, PATCH).transpose(1, 3, 0, 2, 4)
            code = first_code(shape, color)
            patches[code : code + QUARTERS] = quarters.reshape(QUARTERS, 3, PATCH, PATCH)
    return patches


class SceneTokenizer(Tokenizer):
    """A patch's code is that of the nearest drawn patch, so `encode(decode(codes)) == codes`."""

    patches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary, self.downsample = VOCABULARY, PATCH
        self.register_buffer("patches", torch.from_numpy(draw_patches()), persistent=False)  # (V, 3, 6, 6)

    def config(self) -> dict[str, Any]:
        return {"kind": "scenes"}

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=False)
        return self._nearest(images.double())

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        b, height, width = codes.shape
        patches = self.patches[codes]  # (B, H, W, 3, 6, 6)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, height * PATCH, width * PATCH)

    def encode_float(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=True)
        return self._nearest((images.double() + 1) * 127.5)

    def decode_float(self, codes: Tensor) -> Tensor:
        return self.decode(codes).float() / 127.5 - 1

    def _nearest(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) float64 in 0 .. 255 -> codes (B, H, W)."""
        b, _, h, w = images.shape
        cut = images.reshape(b, 3, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)
        known = self.patches.double().flatten(1)  # (V, 108)
        return ((known**2).sum(1) - 2 * cut @ known.T).argmin(-1)
