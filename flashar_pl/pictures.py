"""Pictures of a run: sample grids and gate maps.

Shapes: n images of h x w pixels; H, W grid.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from flashar_pl.files import replacing

SMALLEST_SIDE = 64
"""Images with a shorter side are enlarged by a whole factor, pixel by pixel."""


TEXT_SIZE = 14
"""Of labels, in pixels."""


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


def sheet(blocks: Sequence[tuple[str, Tensor]], heads: Sequence[str], columns: int = 10) -> Tensor:
    """Blocks of images under common heads, such as real images above those of several models: (3, h', w') uint8.

    Args:
        blocks: what stands left of a block, in one or more lines, and its images (n, 3, h, w) uint8, line by line of
            one image for each head, the last line perhaps shorter; all of one size.
        heads: what stands above each column, such as the class.
        columns: the most beside each other; more heads are divided evenly, one part below the other.
    """
    parts = -(-len(heads) // columns)
    columns = -(-len(heads) // parts)
    sheets = []
    for begin in range(0, len(heads), columns):
        own = range(begin, min(begin + columns, len(heads)))
        chosen = [(label, [i for i in range(len(images)) if i % len(heads) in own]) for label, images in blocks]
        part = [(label, images[rows]) for (label, rows), (_, images) in zip(chosen, blocks, strict=True) if rows]
        sheets.append(_sheet(part, heads[own.start : own.stop]))
    width = max(each.shape[2] for each in sheets)
    return torch.cat([functional.pad(each, (0, width - each.shape[2]), value=255) for each in sheets], 1)


def _sheet(blocks: Sequence[tuple[str, Tensor]], heads: Sequence[str]) -> Tensor:
    """One part of a sheet."""
    columns, space, line = len(heads), 12, TEXT_SIZE + 4
    tiles = [tile(images, columns) for _, images in blocks]
    font, pen = ImageFont.load_default(TEXT_SIZE), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 3 * space + round(max(pen.textlength(row, font) for label, _ in blocks for row in label.split("\n")))
    width = (tiles[0].shape[2] + 2) / columns
    top = space + line
    height = top + sum(each.shape[1] + space for each in tiles)
    canvas = Image.new("RGB", (left + tiles[0].shape[2] + space, height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        middle = left + round((column + 0.5) * width) - 1
        pen.text((middle, top - 4), shortened(head, width - 4, font), "black", font, anchor="ms")
    for (label, _), each in zip(blocks, tiles, strict=True):
        canvas.paste(picture(each), (left, top))
        rows = label.split("\n")
        start = top + each.shape[1] // 2 - line * (len(rows) - 1) // 2
        for number, row in enumerate(rows):
            pen.text((left - space, start + number * line), row, "black", font, anchor="rm")
        top += each.shape[1] + space
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def shortened(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of a text as has room, with ... where that is not all."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


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


def picture(image: Tensor) -> Image.Image:
    """An image (3, h, w) uint8 as Pillow's."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def png_bytes(image: Tensor) -> bytes:
    """An image (3, h, w) uint8 as PNG."""
    buffer = io.BytesIO()
    picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Tensor, path: str | Path) -> Path:
    """Write an image (3, h, w) uint8; it appears complete or not at all."""
    with replacing(path) as part:
        part.write_bytes(png_bytes(image))
    return Path(path)
