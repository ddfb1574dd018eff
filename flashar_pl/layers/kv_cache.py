"""Static key/value cache in plan order: the visible keys of a step are one contiguous slice.

Shapes: R rows, G key/value heads, K positions (prefix + slots), E head width, n new positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheSpec:
    """What a backbone needs cached per layer."""

    n_layer: int
    n_kv_head: int
    head_dim: int


class KVCache:
    """Keys and values of every layer, allocated once. `filled` positions are valid; a forward appends n more.

    All layers of one forward append at the same place; `advance` then moves the mark.
    """

    def __init__(self, spec: CacheSpec, rows: int, length: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (spec.n_layer, rows, spec.n_kv_head, length, spec.head_dim)
        self._memory = torch.empty(2, *shape, dtype=dtype, device=device)
        self.restart()

    def restart(self) -> None:
        """Forget everything; the memory stays."""
        self.keys, self.values = self._memory[0], self._memory[1]  # (layers, R, G, K, E) each
        self.filled = 0
        self.n_prefix = 0  # how many of the filled positions belong to the prefix

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (R, G, n, E) of `layer` after the filled positions; return all visible ones (R, G, filled + n, E)."""
        end = self.filled + keys.shape[2]
        assert end <= self.keys.shape[3], f"cache holds {self.keys.shape[3]} positions, {end} are needed"
        self.keys[layer, :, :, self.filled : end] = keys
        self.values[layer, :, :, self.filled : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n: int) -> None:
        """Make the n positions just appended by every layer valid."""
        self.filled += n

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` rows, until `restart`."""
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]
