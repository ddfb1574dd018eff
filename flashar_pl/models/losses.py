"""Cross-entropies of two linear heads and their gated mix, chunked over targets (Eq. 8-10).

The logits of a chunk exist only while the chunk is worked on; the backward pass computes them again. So the memory
of the loss does not grow with the number of targets.

Shapes: M targets, D width, V codes, c targets of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashar_pl.numerics import full_precision, wide

AUX_WEIGHT = 0.05
"""Weight of L_H + L_V in the training loss (Sec. 4.3)."""

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Logits of one head in the largest chunk: 8 MiB of float32 on a CPU, 64 MiB on a GPU, where small GEMMs are slow."""


def chunk_size(targets: int, vocabulary: int, device_type: str) -> int:
    """Targets per chunk: a sixteenth of them, but not less than an eighth of the largest chunk.

    About five chunks are alive at a time: a third of one set of logits, unless these are small.
    """
    largest = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]) // vocabulary
    return max(1, min(largest, max(largest // 8, targets // 16)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype GEMMs would have here: autocast's if it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(c, V), (c,) -> (c,): -log softmax at the label."""
    return torch.logsumexp(logits, -1) - logits.gather(-1, labels[:, None]).squeeze(-1)


def _nll_gradient_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """(c, V): scale * d nll / d logits; overwrites `logits`."""
    error = logits.sub_(torch.logsumexp(logits, -1, keepdim=True)).exp_()
    error.scatter_add_(-1, labels[:, None], -torch.ones_like(scale)[:, None])
    return error.mul_(scale[:, None])


class _HeadGradients:
    """Accumulates the gradients of one linear head over chunks, in float32 or wider."""

    def __init__(self, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> None:
        self.x = torch.empty_like(x) if needs_x else None
        self.weight = torch.zeros_like(wide(weight)) if needs_weight else None
        self.like = weight

    def add(self, rows: slice, error: Tensor, x: Tensor, weight: Tensor) -> None:
        """error (c, V) float32 is d loss / d logits; x (c, D) and weight (V, D) are in the compute dtype."""
        error = error.to(x.dtype)
        if self.x is not None:
            self.x[rows] = (error @ weight).to(self.x.dtype)
        if self.weight is None:
            return
        if x.dtype == self.weight.dtype:
            self.weight.addmm_(error.t(), x)
        else:
            self.weight.add_(error.t() @ x)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        return self.x, None if self.weight is None else self.weight.to(self.like.dtype)


class _SingleHead(torch.autograd.Function):
    """nll (M,) of labels under logits x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.dtype = dtype
        w = weight.to(dtype)
        size = chunk_size(len(labels), weight.shape[0], x.device.type)
        with full_precision(x.device.type):
            return torch.cat(
                [_nll(wide(a.to(dtype) @ w.t()), b) for a, b in zip(x.split(size), labels.split(size))]
                or [wide(x.new_empty(0))]
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        gradients = _HeadGradients(x, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        w = weight.to(ctx.dtype)
        size = chunk_size(len(labels), weight.shape[0], x.device.type)
        for begin in range(0, len(labels), size):
            rows = slice(begin, begin + size)
            a = x[rows].to(ctx.dtype)
            gradients.add(rows, _nll_gradient_(wide(a @ w.t()), labels[rows], grads[0][rows]), a, w)
        return (*gradients.result(), None, None)


class _TwoHeads(torch.autograd.Function):
    """nll (M,) of the same labels under z = g z_H + (1 - g) z_V (Eq. 8), under z_H and under z_V."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        v: Tensor,
        gate: Tensor,
        weight_h: Tensor,
        weight_v: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h, v, gate, weight_h, weight_v, labels)
        ctx.dtype = dtype
        w_h, w_v = weight_h.to(dtype), weight_v.to(dtype)
        out = [torch.empty(len(labels), dtype=wide(h[:0]).dtype, device=h.device) for _ in range(3)]
        size = chunk_size(len(labels), weight_h.shape[0], h.device.type)
        with full_precision(h.device.type):
            for begin in range(0, len(labels), size):
                rows = slice(begin, begin + size)
                z_h, z_v = wide(h[rows].to(dtype) @ w_h.t()), wide(v[rows].to(dtype) @ w_v.t())  # (c, V)
                out[1][rows], out[2][rows] = _nll(z_h, labels[rows]), _nll(z_v, labels[rows])
                out[0][rows] = _nll(torch.lerp(z_v, z_h, gate[rows, None].to(z_h.dtype)), labels[rows])
        return out[0], out[1], out[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, v, gate, weight_h, weight_v, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients_h = _HeadGradients(h, weight_h, needs[0], needs[3])
        gradients_v = _HeadGradients(v, weight_v, needs[1], needs[4])
        gate_gradient = torch.zeros_like(gate) if needs[2] else None
        w_h, w_v = weight_h.to(ctx.dtype), weight_v.to(ctx.dtype)
        size = chunk_size(len(labels), weight_h.shape[0], h.device.type)
        for begin in range(0, len(labels), size):
            rows = slice(begin, begin + size)
            a_h, a_v = h[rows].to(ctx.dtype), v[rows].to(ctx.dtype)
            z_h, z_v = wide(a_h @ w_h.t()), wide(a_v @ w_v.t())
            g = gate[rows, None].to(z_h.dtype)
            error = _nll_gradient_(torch.lerp(z_v, z_h, g), labels[rows], grads[0][rows])
            if gate_gradient is not None:
                gate_gradient[rows] = (torch.linalg.vecdot(error, z_h) - torch.linalg.vecdot(error, z_v)).to(gate.dtype)
            error_h = _nll_gradient_(z_h, labels[rows], grads[1][rows])
            gradients_h.add(rows, error_h.addcmul_(error, g), a_h, w_h)
            del z_h, error_h
            error_v = _nll_gradient_(z_v, labels[rows], grads[2][rows])
            gradients_v.add(rows, error_v.addcmul_(error, 1 - g), a_v, w_v)
            del z_v, error_v, error
        (d_h, d_weight_h), (d_v, d_weight_v) = gradients_h.result(), gradients_v.result()
        return d_h, d_v, gate_gradient, d_weight_h, d_weight_v, None, None


def head_nll(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-log p of labels (M,) int64 under one head: x (M, D), weight (V, D) -> (M,) float32 nats."""
    return _SingleHead.apply(x, weight, labels, _compute_dtype(x))


def dual_nll(
    h: Tensor, v: Tensor, gate: Tensor, weight_h: Tensor, weight_v: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of labels (M,) int64 under the fused, the horizontal and the vertical logits, each (M,) float32 nats.

    h, v: (M, D) final hidden states at the horizontal and vertical source; gate: (M,) weight of H; weights (V, D).
    """
    return _TwoHeads.apply(h, v, gate, weight_h, weight_v, labels, _compute_dtype(h))
