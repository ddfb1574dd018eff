"""PNG files: single images and grids of them.

Shapes: N images of h x w pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SIDE = 48
"""Images of a grid are enlarged by a whole factor until they are at least this wide."""


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image (3, h, w)."""
    from PIL import Image

    assert image.ndim == 3
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path, format="PNG")


def tile(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (N, 3, h, w) uint8 side by side in rows of `columns`, on white: (3, h', w') uint8."""
    n, _, h, w = images.shape
    factor = max(1, -(-SMALLEST_SIDE // max(h, w)))
    large = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    h, w = h * factor, w * factor
    rows = -(-n // columns)
    sheet = images.new_full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255)
    for i, image in enumerate(large):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet
