"""Rotary position embeddings, 1-D and 2-D, as data: a table of (cos, sin) per position, applied to queries and keys.

A table row of zeros (cos = sin = 0) zeroes that position's query and key. LlamaGen treats its prefix so, and its
weights rely on it.

Shapes: X rows of a table (1 or R), L positions, E head width, R rows, A heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashar_pl.numerics import wider

Rope = Tensor
"""(X, L, E / 2, 2) float32: cos and sin of every pair of dimensions, X = 1 or R."""


TRAINED = "original_max_position_embeddings"
"""Positions of a model before its RoPE was scaled."""
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED),
    "yarn": ("factor", TRAINED),
}
"""Kinds of scaled RoPE, by `rope_type` of `rope_parameters` in config.json, and the numbers that each needs."""
Scaling = Mapping[str, Any]
"""`rope_type`, and its numbers under the names of config.json."""


def frequencies(
    width: int, base: float, device: torch.device | str | None = None, scaling: Scaling | None = None
) -> Tensor:
    """(width / 2,) float32: base^(-2k / width), slowed down as `scaling` says."""
    found = 1.0 / (base ** (torch.arange(0, width, 2, device=device)[: width // 2].float() / width))
    if scaling is None:
        return found
    slow = found / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    if scaling["rope_type"] == "llama3":  # by full turns within the positions that were trained
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((scaling[TRAINED] * found / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    else:  # YaRN (Peng et al., 2023, Eq. 17 to 20): a ramp over the pairs between two numbers of turns
        turns = (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        first, last = (width * math.log(scaling[TRAINED] / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        span = last - first or 0.001
        kept = 1 - ((torch.arange(width // 2, device=device).float() - first) / span).clamp(0, 1)
    return slow * (1 - kept) + found * kept


def rope_gain(scaling: Scaling | None) -> float:
    """What cos and sin are multiplied by: YaRN sharpens attention (its Eq. 22)."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    grown = math.log(max(scaling["factor"], 1.0))
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return (0.1 * over * grown + 1) / (0.1 * under * grown + 1)
    return 0.1 * grown + 1


def angles_1d(position: Tensor, head_dim: int, base: float, scaling: Scaling | None = None) -> Tensor:
    """Angles (..., E / 2) for positions (...)."""
    return position[..., None].float() * frequencies(head_dim, base, position.device, scaling)


def angles_2d(row: Tensor, column: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles (..., E / 2): the first half of the pairs turns with the row, the second with the column (LlamaGen)."""
    assert head_dim % 4 == 0, "both halves turn in pairs"
    frequency = frequencies(head_dim // 2, base, row.device)  # (E / 4,)
    return torch.cat([row[..., None].float() * frequency, column[..., None].float() * frequency], dim=-1)


def angles_sections(
    position: Tensor, width: int, base: float, sections: tuple[int, ...], scaling: Scaling | None = None
) -> Tensor:
    """Angles (..., width / 2) for positions (..., 3), of time, row and column: pairs of dimensions in sections, which
    turn with the three in turn (M-RoPE).
    """
    assert sum(sections) == width // 2, "every pair has a section"
    axis = [i % 3 for i, n in enumerate(sections) for _ in range(n)]
    return position[..., axis].float() * frequencies(width, base, position.device, scaling)


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
