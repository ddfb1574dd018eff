"""What decoding must move and compute: the GEMMs, bytes and FLOPs of every forward of a plan, and the floors from them.

Forward 0 feeds the prefix, forward t the slots of step t - 1; each ends with the heads' logits of step t. Counted are
the weights of the layers (once per forward), the head rows that score codes, the embedded rows and the KV cache.
Activations are not: they fit in a cache, or could.

Letters: B images, R rows (B, or 2B with guidance), P prefix, n slots of a step, D width, V codes, A query heads,
G key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashar_pl.grid import DecodePlan, make_plan
from flashar_pl.models.dual_head import step_sources
from flashar_pl.planner.sizes import Linear, ModelSizes, block_linears

GIB = 2**30


@dataclass(frozen=True)
class Gemm:
    """`rows` vectors through a matrix of `linear`'s sizes, `count` times with other weights."""

    linear: Linear
    rows: int
    count: int = 1

    @property
    def flops(self) -> int:
        """One multiplication and one addition per weight and row."""
        return 2 * self.rows * self.linear.parameters * self.count


@dataclass(frozen=True)
class Forward:
    """One forward and the logits that follow it."""

    slots: int
    """Positions fed in each row: P for the first forward, n for the others."""
    gemms: tuple[Gemm, ...]
    weight_bytes: int
    cache_bytes: int
    """KV cache read and written, and embedding rows."""
    flops: int
    """GEMMs and attention."""

    @property
    def bytes(self) -> int:
        """All traffic that counts."""
        return self.weight_bytes + self.cache_bytes

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds below which no implementation can be: the slower of memory (bytes/s) and arithmetic (FLOP/s)."""
        return max(self.bytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class DecodeJob:
    """Decoding of one batch."""

    plan: DecodePlan
    batch: int
    rows: int
    forwards: tuple[Forward, ...]

    @property
    def bytes(self) -> int:
        """Traffic of the whole batch."""
        return sum(forward.bytes for forward in self.forwards)

    @property
    def flops(self) -> int:
        """Arithmetic of the whole batch."""
        return sum(forward.flops for forward in self.forwards)

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds for the batch: each forward at the slower of both bounds."""
        return sum(forward.floor(bandwidth, rate) for forward in self.forwards)


def decode_job(
    sizes: ModelSizes,
    plan: str,
    grid: tuple[int, int],
    batch: int = 1,
    guided: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    prefix: int | None = None,
) -> DecodeJob:
    """Every forward of decoding `batch` images.

    guided: two rows per image, in one batch. prefix: positions; None = usual for the model.

    Raises:
        ValueError: unknown plan, or a diagonal plan for a raster model.
    """
    order = make_plan(plan, *grid, row_end=sizes.row_ends)
    if order.has_vertical and not sizes.flashar:
        raise ValueError(f"the {plan} plan needs a vertical head, and this is a raster model.")
    rows = batch * (2 if guided else 1)
    length = sizes.prefix if prefix is None else prefix
    heads = step_sources(order, sizes.corner)
    forwards = []
    seen = 0
    for t in range(order.n_steps):
        n = length if t == 0 else order.slots_of_step[t - 1].stop - order.slots_of_step[t - 1].start
        seen += n
        at = heads[t]
        h_rows, v_rows = at.h.stop - at.h.start, at.v.stop - at.v.start
        both = h_rows - at.only_h if v_rows else 0
        forwards.append(_forward(sizes, order.has_vertical, rows, n, seen, (h_rows, v_rows, both), t == 0, dtype))
    return DecodeJob(order, batch, rows, tuple(forwards))


def _forward(
    sizes: ModelSizes,
    vertical: bool,
    rows: int,
    n: int,
    seen: int,
    logits: tuple[int, int, int],
    first: bool,
    dtype: torch.dtype,
) -> Forward:
    """One forward: `n` new positions in each of `rows` rows, `seen` cached ones after it, then the heads' logits
    (cells of H, cells of V, cells of both)."""
    layers = sizes.n_layer + (sizes.vertical_layers if vertical else 0)
    gemms = [Gemm(linear, rows * n, layers) for linear in block_linears(sizes.block)]
    if first:
        gemms += [Gemm(linear, rows * n) for linear in sizes.condition_linears]
    head = Linear("head", sizes.dim, sizes.vocabulary)
    h_rows, v_rows, both = logits
    gemms += [Gemm(head, rows * cells) for cells in (h_rows, v_rows) if cells]
    if both and sizes.gated:
        gemms.append(Gemm(Linear("gate", 2 * sizes.dim, sizes.gate_width), rows * both))
    norms = layers * 2 * sizes.dim + sizes.dim * (2 if vertical else 1)
    weights = norms + sum(gemm.linear.parameters * gemm.count for gemm in gemms)
    block = sizes.block
    key_value = 2 * block.n_kv_head * block.head_dim * layers * rows  # elements of K and V per position
    attention = 4 * rows * block.n_head * block.head_dim * n * seen * layers  # q k^T and p v
    return Forward(
        slots=n,
        gemms=tuple(gemms),
        weight_bytes=weights * dtype.itemsize,
        cache_bytes=(key_value * (seen + n) + rows * n * sizes.dim) * dtype.itemsize,
        flops=sum(gemm.flops for gemm in gemms) + attention,
    )


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes that decoding needs at its peak."""

    weights: int
    cache: int
    logits: int
    """Of the largest step, float32: both heads, their mix, and float64 sums of probabilities while drawing."""
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.logits + self.activations


def model_bytes(sizes: ModelSizes, dtype: torch.dtype) -> int:
    """Bytes of one copy of a model."""
    return (sizes.n_parameters + sizes.buffer_elements) * dtype.itemsize


def decode_memory(
    sizes: ModelSizes,
    plan: str,
    grid: tuple[int, int],
    batch: int = 1,
    guided: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    prefix: int | None = None,
) -> DecodeMemory:
    """Peak memory of decoding `batch` images with the static cache."""
    order = make_plan(plan, *grid, row_end=sizes.row_ends)
    rows = batch * (2 if guided else 1)
    length = sizes.prefix if prefix is None else prefix
    layers = sizes.n_layer + (sizes.vertical_layers if order.has_vertical else 0)
    block = sizes.block
    cells = max(len(step) for step in order.cells_of_step)
    fed = max(length, max(part.stop - part.start for part in order.slots_of_step))
    widest = max(linear.n_in + linear.n_out for linear in block_linears(block))
    # float32 logits: H, V, their mix and its concatenation for all rows; guided, filtered, softmax (4 bytes each) and
    # two float64 tensors for the conditional ones
    logits = cells * sizes.vocabulary * (rows * 4 * (4 if order.has_vertical else 2) + batch * (3 * 4 + 2 * 8))
    return DecodeMemory(
        weights=model_bytes(sizes, dtype),
        cache=2 * layers * rows * block.n_kv_head * (length + order.n_inputs) * block.head_dim * dtype.itemsize,
        logits=logits,
        activations=rows * fed * (3 * widest + 8 * sizes.dim) * max(dtype.itemsize, 4),
    )


def largest_batch(
    sizes: ModelSizes,
    plan: str,
    grid: tuple[int, int],
    available: int,
    guided: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    cap: int = 1024,
    prefix: int | None = None,
) -> int:
    """Largest batch up to `cap` whose memory fits into `available` bytes; 0 if not even one image fits."""

    def fits(batch: int) -> bool:
        return decode_memory(sizes, plan, grid, batch, guided, dtype, prefix).total <= available

    low, high = 0, cap
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
