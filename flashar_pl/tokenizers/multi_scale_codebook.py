"""The codebook of VAR's tokenizer: what a scale adds to an image, and what the next scale sees of that.

Shapes: B images, K scales of p_0 < ... < p_(K-1) = P codes a side, V code vectors of dimension D, n codes.
Source: Tian et al. 2024 (VAR), Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.tokenizers.conv_tokenizer import Codebook

PATCH_NUMS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""The published scales, by side of the image in pixels."""


class Phi(nn.Module):
    """(1 - r) h + r conv(h): softens what the enlargement of a small grid leaves."""

    def __init__(self, dim: int, residual: float) -> None:
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return (1 - self.residual) * h + self.residual * self.conv(h)


class MultiScaleCodebook(Codebook):
    """The code vectors, the convolutions phi, and the published counter of used codes (K', V), which does nothing.

    It is what drawing needs of the tokenizer: what a scale adds to the image, and what the next one sees of that.
    """

    def __init__(self, codes: int, dim: int, patch_nums: tuple[int, ...], phis: int = 4, residual: float = 0.5) -> None:
        super().__init__(codes, dim)
        self.phis = phis
        self.phi = nn.ModuleList(Phi(dim, residual) for _ in range(phis or len(patch_nums)))
        self.set_scales(patch_nums)
        self.register_buffer("hits", torch.zeros(len(patch_nums), codes))

    def set_scales(self, patch_nums: tuple[int, ...]) -> None:
        """Other scales for the same weights. ValueError where each scale has its own phi and the number differs."""
        check_patch_nums(patch_nums)
        if not self.phis and len(patch_nums) != len(self.phi):
            raise ValueError(f"patch_nums is {list(patch_nums)}; these weights are for {len(self.phi)} scales.")
        self.patch_nums, self.phi_of = tuple(patch_nums), phi_index(len(patch_nums), self.phis)

    def scale(self, k: int, ids: Tensor) -> Tensor:
        """What ids (B, p_k^2) of scale k add: their vectors enlarged to (B, D, P, P), through its phi."""
        side, last = self.patch_nums[k], self.patch_nums[-1]
        h = F.embedding(ids, self.embedding.weight).transpose(1, 2).unflatten(2, (side, side))  # (B, D, p_k, p_k)
        if side != last:
            h = F.interpolate(h, (last, last), mode="bicubic")
        return self.phi[self.phi_of[k]](h)

    def next_input(self, total: Tensor, k: int) -> Tensor:
        """What VAR sees at scale k + 1: the sum of scales 0..k (B, D, P, P), shrunk to (B, p_(k+1)^2, D)."""
        return shrink(total, self.patch_nums[k + 1]).flatten(2).transpose(1, 2)

    def running_sums(self, ids: Tensor) -> list[Tensor]:
        """The sum (B, D, P, P) of the scales up to each, of the ids (B, n) of the first scales, or of all."""
        sums: list[Tensor] = []
        for k, part in enumerate(ids.split(self._lengths(ids.shape[1]), dim=1)):
            h = self.scale(k, part)
            sums.append(sums[-1] + h if sums else h)
        return sums

    def _lengths(self, n: int) -> list[int]:
        """Codes of each of the first scales, n in all."""
        lengths = [side * side for side in self.patch_nums]
        while sum(lengths) > n:
            lengths.pop()
        return lengths


def shrink(x: Tensor, side: int) -> Tensor:
    """(B, D, P, P) to (B, D, side, side): means over areas."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def phi_index(scales: int, phis: int) -> list[int]:
    """Which of the `phis` every scale uses (0 = its own): the first of equally spaced ticks nearest to k / (K - 1).

    Some distances are equal but for rounding; float64 as written here decides as the published code does.
    """
    if phis == 0:
        return list(range(scales))
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    return [int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales)]


def check_patch_nums(patch_nums: Sequence[int]) -> None:
    """Raises ValueError unless there are two scales or more, growing."""
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(a >= b for a, b in pairwise(patch_nums)):
        raise ValueError(f"patch_nums is {list(patch_nums)}; expected two or more growing sides, for example 1,2,3,4.")
