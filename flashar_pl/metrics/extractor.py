"""Feature extractors: images in, feature rows out.

An extractor is any `nn.Module` with an integer `num_features` that maps uint8 images (B, 3, h, w) to (B, num_features).
Subclasses of `FeatureExtractor` also give spatial features (sFID) and class logits (Inception Score) from one pass.

Shapes: B batch, h x w image, D pooled features, S spatial features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashar_pl.numerics import strict_float32


@dataclass(frozen=True)
class Features:
    """What one pass over B images yields; None where the extractor has no such output."""

    pool: Tensor
    """(B, D) float."""
    spatial: Tensor | None = None
    """(B, S) float."""
    logits: Tensor | None = None
    """(B, C) float."""

    def first(self, n: int) -> Features:
        """Those of the first n images."""
        spatial, logits = (None if part is None else part[:n] for part in (self.spatial, self.logits))
        return Features(self.pool[:n], spatial, logits)


class FeatureExtractor(nn.Module):
    """Base of the extractors: `num_features` is D, `num_spatial` is S or None, `num_classes` is C or None."""

    num_features: int
    num_spatial: int | None = None
    num_classes: int | None = None

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, h, w)."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Text that changes with the weights; cached reference statistics are stored under it."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of uint8 images (B, 3, h, w)."""
        return self.extract(images).pool


def check_images(images: Tensor) -> Tensor:
    """Return `images` if they are uint8 (B, 3, h, w); ValueError otherwise.

    Every metric here sees 8-bit images, as the ADM evaluator does: rounding is part of the measured quantity.
    """
    if not torch.is_tensor(images) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
        raise ValueError(
            f"images are {got}; expected uint8 (B, 3, h, w): tokenizer.decode gives such, decode_float does not."
        )
    return images


def state_digest(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change with names or values of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def device_of(extractor: nn.Module) -> torch.device:
    """Device of the extractor's first parameter or buffer; CPU where it has none."""
    for tensor in (*extractor.parameters(), *extractor.buffers()):
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def extract_features(extractor: nn.Module, images: Tensor) -> Features:
    """Checked, gradient-free features of uint8 images (B, 3, h, w) from any extractor.

    Raises:
        ValueError: images are not uint8 (B, 3, h, w).
    """
    images = check_images(images).to(device_of(extractor))
    with strict_float32(images.device.type):  # also inside a mixed-precision step
        features = extractor.extract(images) if isinstance(extractor, FeatureExtractor) else Features(extractor(images))
    assert tuple(features.pool.shape) == (len(images), extractor.num_features)
    return features
