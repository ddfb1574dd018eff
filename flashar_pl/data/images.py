"""Pixels before the tokenizer: centre crops, ten crops, aspect-ratio buckets.

Shapes: n images of h x w pixels, S side of a square crop, s side of a tokenised crop, f pixels per code,
H = h / f rows and W = w / f columns of codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashar_pl.grid import grid_of_ratio
from flashar_pl.image_files import Unreadable as Unreadable
from flashar_pl.image_files import cut_strip, open_rgb

RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Width / height of the default buckets."""


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square (3, size, size) uint8 of an RGB image, as in ADM's evaluation and LlamaGen's code extraction.

    The image is halved with a box filter while its shorter side is at least twice `size`, then resized bicubically
    so that the shorter side is `size`, then the centre is cut out (Dhariwal and Nichol 2021, data preparation).
    """
    image = cut_strip(image)
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return to_array(image.crop((left, top, left + size, top + size)))


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as (3, h, w) uint8."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Ten crops of side `size` of each square image (n, 3, S, S): (n, 10, 3, s, s), in torchvision's order.

    Top left, top right, bottom left, bottom right, centre; then the same five places of the mirror image.
    """
    far = images.shape[-1] - size
    middle = round(far / 2)  # halves to even, as in torchvision
    places = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    crops = [
        picture[..., top : top + size, left : left + size]
        for picture in (images, images.flip(-1))
        for top, left in places
    ]
    return torch.stack(crops, dim=1)


def views(images: Tensor, crops: int, size: int) -> Tensor:
    """K crops of each image (n, 3, h, w): ten of side `size`; itself and its mirror image (2); itself (1).

    Returns (n, K, 3, ., .).
    """
    if crops == 10:
        return ten_crop(images, size)
    return torch.stack([images, images.flip(-1)][:crops], dim=1)


@dataclass(frozen=True)
class SquareCrop:
    """Bytes of an image file -> its centre square (3, size, size) uint8."""

    size: int

    def __call__(self, data: bytes) -> np.ndarray:
        return centre_crop(open_rgb(data), self.size)


@dataclass(frozen=True)
class BucketCrop:
    """Bytes of an image file -> the pixels (3, H f, W f) uint8 of the bucket nearest in aspect ratio."""

    grids: tuple[tuple[int, int], ...]
    """(H, W) of each bucket."""
    downsample: int
    """f."""

    def __call__(self, data: bytes) -> np.ndarray:
        image = open_rgb(data)
        height, width = nearest_grid(image.width / image.height, self.grids)
        return fit(image, height * self.downsample, width * self.downsample)


def nearest_grid(ratio: float, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid (H, W) whose W / H is nearest to `ratio` on a logarithmic scale, the first one of equals."""
    return min(grids, key=lambda grid: abs(math.log(ratio * grid[0] / grid[1])))


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The largest centred part of an RGB image with this aspect ratio, resized bicubically: (3, h, w) uint8."""
    scale = min(image.width / width, image.height / height)
    part_width, part_height = width * scale, height * scale
    left, top = (image.width - part_width) / 2, (image.height - part_height) / 2
    # Rounding may leave the image by 1e-13, which Pillow refuses.
    box = (max(left, 0), max(top, 0), min(left + part_width, image.width), min(top + part_height, image.height))
    return to_array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def default_grids(image_size: int, downsample: int) -> tuple[tuple[int, int], ...]:
    """A grid (H, W) for each of `RATIOS`, none with more codes than a square image of `image_size` pixels.

    Raises ValueError unless `image_size` is a multiple of `downsample`.
    """
    if image_size < downsample or image_size % downsample:
        raise ValueError(f"image size {image_size}: expected a multiple of {downsample} (pixels of one code).")
    cells = (image_size // downsample) ** 2
    return tuple(dict.fromkeys(grid_of_ratio(ratio, cells) for ratio in RATIOS))
