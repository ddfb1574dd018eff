"""Rotary position embeddings, 1-D and 2-D, as data: a table of (cos, sin) per position, applied to queries and keys.

A table row of zeros (cos = sin = 0) zeroes that position's query and key. LlamaGen treats its prefix so, and its
weights rely on it.

Shapes: X rows of a table (1 or R), L positions, E head width, R rows, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.numerics import wider

Rope = Tensor
"""(X, L, E / 2, 2) float32: cos and sin of every pair of dimensions, X = 1 or R."""


def frequencies(width: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """(width / 2,) float32: base^(-2k / width)."""
    return 1.0 / (base ** (torch.arange(0, width, 2, device=device)[: width // 2].float() / width))


def angles_1d(position: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles (..., E / 2) for positions (...)."""
    return position[..., None].float() * frequencies(head_dim, base, position.device)


def angles_2d(row: Tensor, column: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles (..., E / 2): the first half of the pairs turns with the row, the second with the column (LlamaGen)."""
    assert head_dim % 4 == 0, "both halves turn in pairs"
    frequency = frequencies(head_dim // 2, base, row.device)  # (E / 4,)
    return torch.cat([row[..., None].float() * frequency, column[..., None].float() * frequency], dim=-1)


def angles_sections(position: Tensor, width: int, base: float, sections: tuple[int, ...]) -> Tensor:
    """Angles (..., width / 2) for positions (..., 3), of time, row and column: pairs of dimensions in sections, which
    turn with the three in turn (M-RoPE).
    """
    assert sum(sections) == width // 2, "every pair has a section"
    axis = [i % 3 for i, n in enumerate(sections) for _ in range(n)]
    return position[..., axis].float() * frequencies(width, base, position.device)


def rotations(angles: Tensor) -> Rope:
    """cos and sin of angles (..., E / 2): (..., E / 2, 2)."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rope(x: Tensor, rope: Rope, interleaved: bool) -> Tensor:
    """Rotate (R, L, A, E) in float32 and return it in its own dtype.

    interleaved: pairs are dimensions (2i, 2i + 1) (LlamaGen); otherwise (i, i + E / 2) (Emu3.5).
    """
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    pairs = pairs.to(wider(x.dtype, rope.dtype), memory_format=torch.contiguous_format)
    rope = rope[:, :, None]  # (X, L, 1, E / 2, 2)
    if torch.compiler.is_compiling():  # Inductor fuses real products only
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)  # (R, L, A, E / 2)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:  # a pair is a complex number, and its rotation one product
        numbers = torch.view_as_complex(pairs if interleaved else pairs.contiguous())
        turned = torch.view_as_real(numbers * torch.view_as_complex(rope))  # (R, L, A, E / 2, 2)
    if not interleaved:
        turned = turned.transpose(-1, -2)
    return turned.to(x.dtype, memory_format=torch.contiguous_format).flatten(-2)
