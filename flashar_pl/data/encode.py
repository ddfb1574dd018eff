"""Pixels to codes on the tokenizer's device, and a hash of a tokenizer's weights.

Shapes: n images, K crops of each, S side before cropping, s side of a crop, H x W grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashar_pl.data.images import ten_crop, with_mirror
from flashar_pl.tokenizers import Tokenizer


@dataclass
class ImageEncoder:
    """Images (n, 3, h, w) uint8 -> codes (n, K, H, W) int64."""

    tokenizer: Tokenizer
    device: torch.device
    crops: int
    """K: ten crops of side `size`; the image and its mirror image (2); the image (1)."""
    size: int | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).to(self.device)
        views = self._views(pixels)  # (n, K, 3, h, w)
        try:
            codes = self.tokenizer.encode(views.flatten(0, 1))  # (n K, H, W)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(views.flatten(0, 1))} crops of {views.shape[-2]} x {views.shape[-1]} pixels do not fit into the "
                f"memory of {self.device}. Use a smaller --batch-size and run the same command again: it continues."
            ) from error
        return codes.unflatten(0, views.shape[:2]).cpu().numpy()

    def _views(self, pixels: Tensor) -> Tensor:
        if self.crops == 10:
            assert self.size is not None
            return ten_crop(pixels, self.size)
        return with_mirror(pixels) if self.crops == 2 else pixels[:, None]


def codes_as_they_are(codes: np.ndarray) -> np.ndarray:
    """For sources that hold codes: (n, K, H, W) unchanged."""
    return codes


def weights_hash(tokenizer: Tokenizer) -> str:
    """A hash of every tensor of a tokenizer: equal for equal weights, in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in tokenizer.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
