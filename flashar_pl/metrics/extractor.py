"""Feature extractors: images in, feature rows out.

All see uint8 images (B, 3, h, w), as the ADM evaluator does: rounding is part of the measured quantity.

Shapes: B batch, h x w image, D pooled features, S spatial features, C classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
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


class FeatureExtractor(nn.Module, ABC):
    """Pooled features (FID), spatial features (sFID) and class logits (Inception Score) from one pass."""

    num_features: int
    """D."""
    num_spatial: int | None = None
    """S; None = no such output."""
    num_classes: int | None = None
    """C; None = no such output."""

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, h, w)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Text that changes with the weights; cached reference statistics are stored under it."""

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of uint8 images (B, 3, h, w)."""
        return self.extract(images).pool


def check_images(images: Tensor) -> Tensor:
    """Return `images` if they are uint8 (B, 3, h, w); ValueError otherwise."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, h, w): tokenizer.decode gives "
            "such, decode_float does not."
        )
    return images


def state_digest(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change with names or values of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def device_of(extractor: FeatureExtractor) -> torch.device:
    """Where the extractor's weights are; the CPU where it has none."""
    return next((tensor.device for tensor in extractor.parameters()), torch.device("cpu"))


def extract_features(extractor: FeatureExtractor, images: Tensor) -> Features:
    """Features in float32, whatever precision the caller has switched on.

    Raises:
        ValueError: see `check_images` and `check_features`.
    """
    return check_features(extractor, unchecked_features(extractor, images))


@torch.no_grad()
def unchecked_features(extractor: FeatureExtractor, images: Tensor) -> Features:
    """The same, without waiting for the device; what is used of them goes through `check_features`."""
    images = check_images(images).to(device_of(extractor))
    with strict_float32(images.device.type):
        features = extractor.extract(images)
    assert tuple(features.pool.shape) == (len(images), extractor.num_features)
    return features


def check_features(extractor: FeatureExtractor, features: Features) -> Features:
    """Return `features`; ValueError where one is NaN or infinite."""
    for name, rows in vars(features).items():
        if rows is not None and not bool(rows.isfinite().all()):
            raise ValueError(
                f"the {name} features of {type(extractor).__name__} are NaN or infinite; its weights are broken."
            )
    return features
