"""Cross-entropies of two linear heads and their gated mix, chunked over targets (Eq. 8-10).

The logits of a chunk exist only while the chunk is worked on; the backward pass computes them again. So the memory
of the loss does not grow with the number of targets.

Shapes: M targets, D width, V codes, c targets of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashar_pl.numerics import full_precision, wide

AUX_WEIGHT = 0.05
"""Weight of L_H + L_V in the training loss (Sec. 4.3)."""

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits of one head in the largest chunk: 16 MiB of float32 on a CPU, 64 MiB on a GPU; small GEMMs are slow."""


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

    def run(self, rows: slice, labels: Tensor, scale: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add targets `rows` that this head alone predicts, chunk by chunk; x and weight as they were saved."""
        dtype = weight.dtype
        for part in _chunks(rows, weight.shape[0], x.device.type):
            a = x[part].to(dtype)
            self.add(part, _nll_gradient_(wide(a @ weight.t()), labels[part], scale[part]), a, weight)


def _chunks(rows: slice, vocabulary: int, device_type: str) -> Iterator[slice]:
    """Targets rows.start .. rows.stop - 1 in chunks."""
    size = chunk_size(rows.stop - rows.start, vocabulary, device_type)
    for begin in range(rows.start, rows.stop, size):
        yield slice(begin, min(begin + size, rows.stop))


def _nll_into(out: Tensor, rows: slice, x: Tensor, weight: Tensor, labels: Tensor) -> None:
    """out[rows] = nll of targets that one head alone predicts; weight in the compute dtype."""
    for part in _chunks(rows, weight.shape[0], x.device.type):
        out[part] = _nll(wide(x[part].to(weight.dtype) @ weight.t()), labels[part])


class _SingleHead(torch.autograd.Function):
    """nll (M,) of labels under logits x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.dtype = dtype
        out = torch.empty(len(labels), dtype=wide(x[:0]).dtype, device=x.device)
        with full_precision(x.device.type):
            _nll_into(out, slice(0, len(labels)), x, weight.to(dtype), labels)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        gradients = _HeadGradients(x, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        gradients.run(slice(0, len(labels)), labels, grads[0], x, weight.to(ctx.dtype))
        return (*gradients.result(), None, None)


class _TwoHeads(torch.autograd.Function):
    """See `dual_nll`. One function for all targets, so that each head has one weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        v: Tensor,
        gate: Tensor,
        weight_h: Tensor,
        weight_v: Tensor,
        labels_h: Tensor,
        labels_v: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h, v, gate, weight_h, weight_v, labels_h, labels_v)
        ctx.dtype = dtype
        w_h, w_v = weight_h.to(dtype), weight_v.to(dtype)
        both, like = len(gate), wide(h[:0])
        fused, nll_h, nll_v = like.new_empty(both), like.new_empty(len(h)), like.new_empty(len(v))
        with full_precision(h.device.type):
            for rows in _chunks(slice(0, both), len(w_h), h.device.type):
                z_h, z_v = wide(h[rows].to(dtype) @ w_h.t()), wide(v[rows].to(dtype) @ w_v.t())  # (c, V)
                nll_h[rows], nll_v[rows] = _nll(z_h, labels_h[rows]), _nll(z_v, labels_v[rows])
                fused[rows] = _nll(torch.lerp(z_v, z_h, gate[rows, None].to(z_h.dtype)), labels_h[rows])
            _nll_into(nll_h, slice(both, len(h)), h, w_h, labels_h)
            _nll_into(nll_v, slice(both, len(v)), v, w_v, labels_v)
        return fused, nll_h, nll_v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, v, gate, weight_h, weight_v, labels_h, labels_v = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients_h = _HeadGradients(h, weight_h, needs[0], needs[3])
        gradients_v = _HeadGradients(v, weight_v, needs[1], needs[4])
        gate_gradient = torch.zeros_like(gate) if needs[2] else None
        w_h, w_v = weight_h.to(ctx.dtype), weight_v.to(ctx.dtype)
        both = len(gate)
        for rows in _chunks(slice(0, both), len(w_h), h.device.type):
            a_h, a_v = h[rows].to(ctx.dtype), v[rows].to(ctx.dtype)
            z_h, z_v = wide(a_h @ w_h.t()), wide(a_v @ w_v.t())
            g = gate[rows, None].to(z_h.dtype)
            error = _nll_gradient_(torch.lerp(z_v, z_h, g), labels_h[rows], grads[0][rows])
            if gate_gradient is not None:
                gate_gradient[rows] = (torch.linalg.vecdot(error, z_h) - torch.linalg.vecdot(error, z_v)).to(gate.dtype)
            error_h = _nll_gradient_(z_h, labels_h[rows], grads[1][rows])
            gradients_h.add(rows, error_h.addcmul_(error, g), a_h, w_h)
            del z_h, error_h
            error_v = _nll_gradient_(z_v, labels_v[rows], grads[2][rows])
            gradients_v.add(rows, error_v.addcmul_(error, 1 - g), a_v, w_v)
            del z_v, error_v, error
        gradients_h.run(slice(both, len(h)), labels_h, grads[1], h, w_h)
        gradients_v.run(slice(both, len(v)), labels_v, grads[2], v, w_v)
        (d_h, d_weight_h), (d_v, d_weight_v) = gradients_h.result(), gradients_v.result()
        return d_h, d_v, gate_gradient, d_weight_h, d_weight_v, None, None, None


def head_nll(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-log p of labels (M,) int64 under one head: x (M, D), weight (V, D) -> (M,) float32 nats."""
    return _SingleHead.apply(x, weight, labels, _compute_dtype(x))


def dual_nll(
    h: Tensor, v: Tensor, gate: Tensor, weight_h: Tensor, weight_v: Tensor, labels_h: Tensor, labels_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p in float32 nats of M targets that both heads predict, and of those that only one of them does.

    Args:
        h: (M + a, D) final hidden states at the horizontal sources: the M common targets, then a others.
        v: (M + b, D) at the vertical sources: the same M targets, then b others.
        gate: (M,) weight of the horizontal logits (Eq. 8).
        weight_h, weight_v: (V, D) heads.
        labels_h, labels_v: (M + a,) and (M + b,) int64.

    Returns:
        fused (M,), horizontal (M + a,), vertical (M + b,).
    """
    return _TwoHeads.apply(h, v, gate, weight_h, weight_v, labels_h, labels_v, _compute_dtype(h))
