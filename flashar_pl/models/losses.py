"""Cross-entropies of two linear heads and their gated mix, chunked over targets (Eq. 8-10).

The logits of a chunk exist only while the chunk is worked on: its losses and its share of every gradient are computed
together, in the forward pass, and the backward pass only scales the gradients. So the memory of the loss does not grow
with the number of targets, and no logit is computed twice.

For this the weight of each target must be known in the forward pass. It is relative (about 1): a common factor, such
as 1 / targets or the scale of a GradScaler, comes with the backward pass, so that errors do not underflow in float16.

Shapes: M targets, D width, V codes, c targets of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashar_pl.numerics import full_precision, wide

AUX_WEIGHT = 0.05
"""Weight of L_H + L_V in the training loss (Sec. 4.3)."""

CHUNK_ELEMENTS = {"cpu": (2**20, 2**22), "cuda": (2**25, 2**26)}
"""Logits of one head in the smallest and the largest chunk: 4 to 16 MiB of float32 on a CPU, 128 to 256 MiB on a GPU.
Every chunk adds to the gradients of the whole heads, which takes longer than its products if the chunk is small."""
PRODUCT_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Rows times width of a head's gradient that are computed in the compute dtype before they are added in float32: on a
CPU they stay in the cache."""


def chunk_size(targets: int, vocabulary: int, device_type: str) -> int:
    """Targets per chunk: a sixteenth of them, within `CHUNK_ELEMENTS`, never more than there are.

    Five sets of a chunk's logits in float32 are alive at a time at most; a plain loss holds seven sets of all targets'.
    """
    smallest, largest = (n // vocabulary for n in CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]))
    return max(1, min(targets, largest, max(smallest, targets // 16)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype GEMMs would have here: autocast's if it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _chunks(begin: int, end: int, vocabulary: int, device_type: str) -> Iterator[slice]:
    """Targets begin .. end - 1 in chunks."""
    size = chunk_size(end - begin, vocabulary, device_type)
    for first in range(begin, end, size):
        yield slice(first, min(first + size, end))


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """(c, V), (c,) -> (c,)."""
    return -log_p.gather(-1, labels[:, None]).squeeze(-1)


def _error_(log_p: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """(c, V): scale * d nll / d logits; overwrites log_p."""
    error = log_p.exp_()
    error.scatter_add_(-1, labels[:, None], -torch.ones_like(scale)[:, None])
    return error.mul_(scale[:, None])


def _add_product_(total: Tensor, error: Tensor, x: Tensor) -> None:
    """total (V, D) += error (c, V)^T x (c, D); total is float32 or wider, error and x are in the compute dtype."""
    if x.dtype == total.dtype:
        total.addmm_(error.t(), x)
        return
    elements = PRODUCT_ELEMENTS.get(x.device.type, PRODUCT_ELEMENTS["cuda"])
    rows = max(1, elements // total.shape[1])
    for begin in range(0, len(total), rows):
        total[begin : begin + rows].add_(error[:, begin : begin + rows].t() @ x)


class _Inputs(NamedTuple):
    """What goes into one head."""

    x: Tensor
    """(M, D) hidden states."""
    weight: Tensor
    """(V, D)."""
    labels: Tensor
    """(M,) int64."""
    scale: Tensor
    """(M,) weight of the loss of each target."""


class _Head:
    """One linear head on its way over the chunks: losses, and sums of gradients in float32 or wider.

    Args:
        inputs: of the head.
        dtype: of the matrix products.
        needs: whether the gradients of x and of weight are wanted.
    """

    def __init__(self, inputs: _Inputs, dtype: torch.dtype, needs: Sequence[bool]) -> None:
        x, weight, self.labels, self.scale = inputs
        self.x = x
        self.weight = weight.to(dtype)  # (V, D)
        self.nll = torch.empty(len(x), dtype=wide(x[:0]).dtype, device=x.device)
        self.d_x = torch.empty_like(x) if needs[0] else None
        self.d_weight = torch.zeros_like(wide(weight)) if needs[1] else None

    def open(self, rows: slice) -> Tensor:
        """Logits (c, V) float32 of a chunk, kept until `close`."""
        self.rows, self.input = rows, self.x[rows].to(self.weight.dtype)  # (c, D)
        self.logits: Tensor | None = wide(self.input @ self.weight.t())
        return self.logits

    def close(self, error: Tensor | None = None, share: Tensor | None = None) -> None:
        """Losses and gradients of the chunk that is open.

        error (c, V) times share (c, 1) is the gradient that reaches these logits through the mix of both heads.
        """
        assert self.logits is not None
        rows, labels = self.rows, self.labels[self.rows]
        log_p, self.logits = torch.log_softmax(self.logits, -1), None  # (c, V)
        self.nll[rows] = _nll(log_p, labels)
        if self.d_x is None and self.d_weight is None:
            return
        own = _error_(log_p, labels, self.scale[rows])
        if error is not None and share is not None:
            own.addcmul_(error, share)
        del log_p
        low = own.to(self.weight.dtype)
        if low is not own:
            del own
        if self.d_x is not None:
            self.d_x[rows] = (low @ self.weight).to(self.d_x.dtype)
        if self.d_weight is not None:
            _add_product_(self.d_weight, low, self.input)

    def alone(self, begin: int) -> None:
        """Targets from `begin` on, which no other head predicts."""
        for rows in _chunks(begin, len(self.x), len(self.weight), self.x.device.type):
            self.open(rows)
            self.close()

    def total(self) -> Tensor:
        """Sum of the scaled losses."""
        return torch.dot(self.nll, self.scale)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of its inputs."""
        return self.d_x, self.d_weight, None, None


class _Gradients:
    """What a forward pass has computed for its backward pass, which uses it once: a gradient or None for each input."""

    def __init__(self, *gradients: Tensor | None) -> None:
        self._gradients: tuple[Tensor | None, ...] | None = gradients

    def take(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times a scalar, in place."""
        if self._gradients is None:
            raise RuntimeError("the loss holds its gradients for one backward pass; compute the loss again.")
        gradients, self._gradients = self._gradients, None
        return tuple(None if each is None else each.mul_(factor.to(each.dtype)) for each in gradients)


class _SingleHead(torch.autograd.Function):
    """See `head_nll`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, dtype: torch.dtype, train: bool
    ) -> tuple[Tensor, Tensor]:
        needs = [train and each for each in ctx.needs_input_grad]
        head = _Head(_Inputs(x, weight, labels, scale), dtype, needs[:2])
        with full_precision(x.device.type):
            head.alone(0)
        ctx.gradients = _Gradients(*head.gradients(), None, None)
        ctx.mark_non_differentiable(head.nll)
        return head.total(), head.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradients.take(grads[0])


class _TwoHeads(torch.autograd.Function):
    """See `dual_nll`. One function for all targets, so that each head has one weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, scale: Tensor, dtype: torch.dtype, train: bool, *heads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """heads: the inputs of the horizontal head, then those of the vertical one."""
        needs = [train and each for each in ctx.needs_input_grad]
        head_h = _Head(_Inputs(*heads[:4]), dtype, needs[4:6])
        head_v = _Head(_Inputs(*heads[4:]), dtype, needs[8:10])
        both, vocabulary, device = len(gate), len(head_h.weight), gate.device.type
        fused = torch.empty_like(head_h.nll[:both])
        d_gate = torch.empty_like(gate) if needs[0] else None
        with full_precision(device):
            for rows in _chunks(0, both, vocabulary, device):
                z_h, z_v = head_h.open(rows), head_v.open(rows)  # (c, V)
                g, labels = gate[rows, None].to(z_h.dtype), head_h.labels[rows]
                log_p = torch.log_softmax(torch.lerp(z_v, z_h, g), -1)  # (c, V), Eq. 8
                fused[rows] = _nll(log_p, labels)
                error = _error_(log_p, labels, scale[rows]) if any(needs) else None
                if d_gate is not None:
                    assert error is not None
                    d_gate[rows] = (torch.linalg.vecdot(error, z_h) - torch.linalg.vecdot(error, z_v)).to(d_gate.dtype)
                del log_p, z_h, z_v
                head_h.close(error, g)
                head_v.close(error, 1 - g)
                del error
            head_h.alone(both)
            head_v.alone(both)
        ctx.gradients = _Gradients(d_gate, None, None, None, *head_h.gradients(), *head_v.gradients())
        ctx.mark_non_differentiable(fused, head_h.nll, head_v.nll)
        total = torch.dot(fused, scale) + head_h.total() + head_v.total()
        return total, fused, head_h.nll, head_v.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradients.take(grads[0])


def head_nll(x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of labels (M,) int64 under one head: x (M, D), weight (V, D).

    Returns sum(scale * nll), which can be differentiated once, and nll (M,) float32 nats, which cannot.
    scale (M,) float32 should be of order 1; see the top of this file.
    """
    return _SingleHead.apply(x, weight, labels, scale, _compute_dtype(x), torch.is_grad_enabled())


def dual_nll(
    h: Tensor,
    v: Tensor,
    gate: Tensor,
    weight_h: Tensor,
    weight_v: Tensor,
    labels_h: Tensor,
    labels_v: Tensor,
    scale: Tensor,
    scale_h: Tensor,
    scale_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-log p in float32 nats of M targets that both heads predict, and of those that only one of them does.

    Args:
        h: (M + a, D) final hidden states at the horizontal sources: the M common targets, then a others.
        v: (M + b, D) at the vertical sources: the same M targets, then b others.
        gate: (M,) weight of the horizontal logits (Eq. 8).
        weight_h, weight_v: (V, D) heads.
        labels_h, labels_v: (M + a,) and (M + b,) int64.
        scale, scale_h, scale_v: float32 weights of the losses of the mix (M,), of the horizontal head (M + a,) and of
            the vertical head (M + b,); of order 1, see the top of this file.

    Returns:
        The sum of all losses times their scales, which can be differentiated once; and, without gradients,
        fused (M,), horizontal (M + a,), vertical (M + b,).
    """
    heads = _Inputs(h, weight_h, labels_h, scale_h), _Inputs(v, weight_v, labels_v, scale_v)
    return _TwoHeads.apply(gate, scale, _compute_dtype(h), torch.is_grad_enabled(), *heads[0], *heads[1])
