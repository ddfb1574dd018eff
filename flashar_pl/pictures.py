"""Pictures of a run: sample grids and gate maps.

Shapes: n images of h x w pixels; H, W grid.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashar_pl.files import replacing

SMALLEST_SIDE = 64
"""Images with a shorter side are enlarged by a whole factor, pixel by pixel."""


def tile(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images (n, 3, h, w) uint8 side by side on white: one image (3, h', w') uint8. Default: about as many rows."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; expected (n, 3, h, w) uint8, n >= 1.")
    images = enlarge(images)
    n, _, h, w = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def enlarge(images: Tensor) -> Tensor:
    """Images (..., h, w) repeated pixel by pixel until the shorter side has `SMALLEST_SIDE` pixels."""
    factor = max(1, -(-SMALLEST_SIDE // min(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def gate_picture(gate: Tensor) -> Tensor:
    """Mean gate (H, W) in [0, 1] as (3, h, w) uint8: red where H decides, blue where V does, white at 0.5."""
    signed = gate.float().clamp(0, 1) * 2 - 1  # (H, W) in [-1, 1]
    fade = 1 - signed.abs()
    red, blue = torch.where(signed < 0, fade, 1.0), torch.where(signed > 0, fade, 1.0)
    return enlarge((torch.stack([red, fade, blue]) * 255).round().to(torch.uint8))


def png_bytes(image: Tensor) -> bytes:
    """An image (3, h, w) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Tensor, path: str | Path) -> Path:
    """Write an image (3, h, w) uint8; it appears complete or not at all."""
    with replacing(path) as part:
        part.write_bytes(png_bytes(image))
    return Path(path)
