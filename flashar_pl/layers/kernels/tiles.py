"""How the work of kernels is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a product is cut into programs: M rows, N outputs and K inputs at a time."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 4

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def tile(rows: int, pairs: bool = False) -> Tile:
    """The tile of products with `rows` rows: weights are read once up to 64 rows. pairs: two products at once.

    Untuned: no GPU has run it. Few rows need many programs with much in flight, many rows few reads of the weights.
    """
    if rows <= 16:
        return Tile(16, 16 if pairs else 32, 128)
    if rows <= 32:
        return Tile(32, 16 if pairs else 32, 128, stages=3)
    return Tile(64, 32 if pairs else 64, 64) if rows <= 256 else Tile(64, 64 if pairs else 128, 32, warps=8, stages=3)


def head_tile(rows: int, outputs: int) -> Tile:
    """The tile of `gate` and `logits`, which hold two and four products: no registers spilt (docs/log.md)."""
    if rows <= 16:
        return Tile(16, outputs, 128)
    return Tile(32, outputs, 64, stages=3) if rows <= 32 else Tile(64, outputs, 64, stages=3)


def power_of_two(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
