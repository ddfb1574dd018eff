"""What decoding must move and compute: the GEMMs, bytes and FLOPs of every forward of a plan, and the floors from them.

Forward 0 feeds the prefix, forward t the slots of step t - 1; each ends with the heads' logits of step t. Counted are
the weights of the layers (once per forward), the head rows that score codes, the embedded rows and the KV cache.
Activations are not: they fit in a cache, or could.

Devices that share the model split heads, feed-forward width and codes: all numbers are those of one of them.

Letters: B images, R rows (B, or 2B with guidance), P prefix, n slots of a step, D width, V codes, A query heads,
G key/value heads, E head width, N devices.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from flashar_pl.checkpoints.description import plan_of
from flashar_pl.decoding.tensor_parallel import check_shares
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.tensor_parallel import share_of
from flashar_pl.layers.transformer import BlockConfig
from flashar_pl.models.sources import StepSources, step_sources
from flashar_pl.planner.sizes import MLP, Linear, ModelSizes


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


@dataclass(frozen=True)
class DecodeJob:
    """Decoding of one batch of images."""

    sizes: ModelSizes
    plan: str
    grid: tuple[int, int]
    batch: int = 1
    guided: bool = True
    """Two rows per image, in one batch."""
    dtype: torch.dtype = torch.bfloat16
    prefix: int | None = None
    """Positions; None = usual for the model."""
    window: tuple[int, int] | None = None
    """Of the lossless plan: slots of a window, and how many windows a batch took. None = as the raster plan."""
    devices: int = 1
    """N, that share the model."""
    rounded: bool = False
    """Each forward reads one byte for a weight of the layers and heads, and a float32 scale for an output
    (layers/rounded.py). `memory` keeps to dtype."""

    @cached_property
    def block(self) -> BlockConfig:
        """What one device holds of a block. Raises ValueError where so many cannot share the model."""
        whole = self.sizes.backbone.block
        if self.devices == 1:
            return whole
        check_shares(self.sizes.model, self.devices)
        return share_of(whole, self.devices)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The projections of one block on one device."""
        block = self.block
        heads, queries = block.n_head + 2 * block.n_kv_head, block.n_head * block.head_dim
        own = {"wqkv": (block.dim, heads * block.head_dim), "wo": (queries, block.dim),
               "w13": (block.dim, 2 * block.ffn_dim), "w2": (block.ffn_dim, block.dim)}  # fmt: skip
        return self.sizes.linears if self.devices == 1 else tuple(Linear(name, *size) for name, size in own.items())

    @cached_property
    def order(self) -> DecodePlan:
        """The plan. Raises ValueError for an unknown one, or a diagonal one of a raster model."""
        order = plan_of(self.sizes.config, self.plan, *self.grid, row_end=self.sizes.backbone.row_ends)
        if order.has_vertical and not self.sizes.flashar:
            raise ValueError(f"the {self.plan} plan needs a vertical head, and this is a raster model.")
        return order

    @property
    def rows(self) -> int:
        """R."""
        return self.batch * (2 if self.guided else 1)

    @property
    def layers(self) -> int:
        """Layers that run."""
        return self.sizes.backbone.n_layer + (self.sizes.vertical_layers if self.order.has_vertical else 0)

    def cache_bytes(self, positions: int) -> int:
        """Keys and values of so many positions, in all layers and rows."""
        block = self.block
        return 2 * self.layers * self.rows * block.n_kv_head * block.head_dim * positions * self.dtype.itemsize

    @cached_property
    def calls(self) -> tuple[tuple[int, int, StepSources], ...]:
        """Of each forward the positions that it feeds in each row, those that it sees, and the states that it scores.

        It feeds P, then the slots of every step but the last, or of a window. Where slots predict their own codes it
        feeds those of the step itself, S times in block diffusion: all positions, or with a cache also what has become
        final before.
        """
        first, heads = self.prefix, step_sources(self.order, self.sizes.model.dual_head.corner)
        first = self.sizes.backbone.conditioning.positions if first is None else first
        slots = [part.stop - part.start for part in self.order.slots_of_step]
        ends = list(accumulate(slots, initial=first))
        if self.window is not None:
            wide, windows = self.window
            seen = [first, *(first + i * self.order.n_slots // windows + wide for i in range(windows))]
            scored = [StepSources(slice(0, n), slice(0, 0), n, 0, False) for n in (1, *[wide] * windows)]
            return tuple(zip([first, *[wide] * windows], seen, scored))
        if self.order.name == "scales":
            return tuple(zip([first + slots[0], *slots[1:]], ends[1:], heads))
        if self.order.name != "blocks":
            return tuple(zip([first, *slots], ends, heads))
        times, before = self.sizes.config["steps"], [first, *slots]
        fed = [(n + before[t] * (s == 0), t) for t, n in enumerate(slots) for s in range(times)]
        return tuple((n, ends[t + 1], heads[t]) if self.cached else (ends[-1], ends[-1], heads[t]) for n, t in fed)

    @property
    def cached(self) -> bool:
        """Whether keys and values are kept from one forward to the next."""
        return bool(self.sizes.config.get("clean_context", True))

    @cached_property
    def forwards(self) -> tuple[Forward, ...]:
        """One for each step, each window of lossless decoding, or each call of block diffusion."""
        return tuple(self._forward(*call) for call in self.calls)

    def _forward(self, n: int, seen: int, at: StepSources) -> Forward:
        """`n` new positions in each row, `seen` cached ones after it, then the heads' logits."""
        sizes, block, rows, layers = self.sizes, self.block, self.rows, self.layers
        gemms = [Gemm(linear, rows * n, layers) for linear in self.linears]
        if seen == n:  # the prefix
            gemms += [Gemm(linear, rows * n) for linear in sizes.condition_linears]
            if of_text := sum(sizes.text_layers[: 1 + self.order.has_vertical]):
                gemms += [Gemm(linear, rows * n, of_text) for linear in self.linears if linear.name in MLP]
        head = Linear("head", sizes.dim, -(-sizes.backbone.vocabulary // self.devices))
        of_h, of_v = at.h.stop - at.h.start, at.v.stop - at.v.start
        gemms += [Gemm(head, rows * cells) for cells in (of_h, of_v) if cells]
        if sizes.gate is not None and of_v and of_h > at.only_h:
            gemms.append(Gemm(sizes.gate, rows * (of_h - at.only_h)))
        norms = layers * 2 * sizes.dim + sizes.dim * (2 if self.order.has_vertical else 1)
        weight_bytes = norms * self.dtype.itemsize
        for gemm in gemms:
            linear, in_bytes = gemm.linear, self.rounded and gemm.linear in (*self.linears, head)
            each = linear.parameters + 4 * linear.n_out if in_bytes else linear.parameters * self.dtype.itemsize
            weight_bytes += each * gemm.count
        attention = 4 * rows * block.n_head * block.head_dim * n * seen * layers  # q k^T and p v
        return Forward(
            gemms=tuple(gemms),
            weight_bytes=weight_bytes,
            cache_bytes=self.cached * self.cache_bytes(seen + n) + rows * n * sizes.dim * self.dtype.itemsize,
            flops=sum(gemm.flops for gemm in gemms) + attention,
        )

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

    @property
    def model_bytes(self) -> int:
        """Bytes of the model on each device; of several, each holds only head rows that score codes."""
        sizes, n = self.sizes, self.devices
        elements = sizes.n_parameters + sizes.buffer_elements
        if n > 1:
            blocks = sizes.backbone.n_layer + sizes.vertical_layers
            cut = blocks * sizes.block_weights + sum(sizes.text_layers) * sizes.mlp_weights + sizes.embedding_parameters
            heads = sizes.parameters["horizontal_head"] + sizes.parameters["vertical_head"]
            here = cut + heads * sizes.backbone.vocabulary // sizes.head_rows
            elements += -(-here // n) - cut - heads
        return elements * self.dtype.itemsize

    @property
    def memory(self) -> DecodeMemory:
        """Peak memory with the static cache."""
        sizes, order, rows = self.sizes, self.order, self.rows
        window = 2 * (order.width + 1) if order.name == "lossless" else 0  # two rows, unless told
        cells = max(window, *(len(step) for step in order.cells_of_step))
        fed, seen = max(call[0] for call in self.calls), max(call[1] for call in self.calls)
        widest = max(linear.n_in + linear.n_out for linear in self.linears)
        # float32 logits: H, V, their mix and its concatenation for all rows; guided, filtered, softmax (4 bytes each)
        # and two float64 tensors for the conditional ones
        per_code = rows * 4 * (4 if order.has_vertical else 2) + self.batch * (3 * 4 + 2 * 8)
        return DecodeMemory(
            weights=self.model_bytes,
            cache=self.cache_bytes(seen + window),
            logits=cells * sizes.backbone.vocabulary * per_code,
            activations=rows * max(window, fed) * (3 * widest + 8 * sizes.dim) * max(self.dtype.itemsize, 4),
        )

    def largest_batch(self, available: int, cap: int = 1024) -> int:
        """Largest batch up to `cap` whose memory fits into `available` bytes; 0 if not even one image fits."""
        return bisect_right(range(1, cap + 1), available, key=lambda batch: replace(self, batch=batch).memory.total)
