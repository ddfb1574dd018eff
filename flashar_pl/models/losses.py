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


class HeadInputs(NamedTuple):
    """What goes into one head, for the targets that it predicts."""

    x: Tensor
    """(M, D) final hidden states."""
    weight: Tensor
    """(V, D)."""
    labels: Tensor
    """(M,) int64."""
    scale: Tensor
    """(M,) float32 weight of the loss of each target; of order 1, see the top of this file."""


class _Head:
    """One linear head on its way over the chunks: losses, and sums of gradients in float32 or wider.

    Args:
        inputs: of the head.
        dtype: of the matrix products.
        needs: whether the gradients of x and of weight are wanted.
    """

    def __init__(self, inputs: HeadInputs, dtype: torch.dtype, needs: Sequence[bool]) -> None:
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


def _mix(h: _Head, v: _Head, gate: Tensor, scale: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor | None]:
    """The first len(gate) targets, which both heads predict: losses of the mix (M,), and the gradient of the gate."""
    fused, d_gate = torch.empty_like(h.nll[: len(gate)]), torch.empty_like(gate) if needs[0] else None
    for rows in _chunks(0, len(gate), len(h.weight), gate.device.type):
        z_h, z_v = h.open(rows), v.open(rows)  # (c, V)
        g, labels = gate[rows, None].to(z_h.dtype), h.labels[rows]
        log_p = torch.log_softmax(torch.lerp(z_v, z_h, g), -1)  # (c, V), Eq. 8
        fused[rows] = _nll(log_p, labels)
        error = _error_(log_p, labels, scale[rows]) if any(needs) else None
        if d_gate is not None:
            assert error is not None
            d_gate[rows] = (torch.linalg.vecdot(error, z_h) - torch.linalg.vecdot(error, z_v)).to(d_gate.dtype)
        del log_p, z_h, z_v
        h.close(error, g)
        v.close(error, 1 - g)
        del error
    return fused, d_gate


class _Losses(torch.autograd.Function):
    """See `head_nll` and `dual_nll`. One function for all targets, so that each head has one weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor | None, scale: Tensor | None, dtype: torch.dtype, train: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """inputs: `HeadInputs` of one head, or with a gate of the horizontal head and then of the vertical one."""
        needs = [train and each for each in ctx.needs_input_grad]
        heads = [_Head(HeadInputs(*inputs[i : i + 4]), dtype, needs[4 + i :]) for i in range(0, len(inputs), 4)]
        total, losses, d_gate = heads[0].nll.new_zeros(()), [head.nll for head in heads], None
        with full_precision(inputs[0].device.type):
            if gate is not None and scale is not None:
                fused, d_gate = _mix(heads[0], heads[1], gate, scale, needs)
                total, losses = torch.dot(fused, scale), [fused, *losses]
            for head in heads:
                head.alone(0 if gate is None else len(gate))
                total = total + torch.dot(head.nll, head.scale)
        gradients = [each for head in heads for each in (head.d_x, head.d_weight, None, None)]
        ctx.gradients = [d_gate, None, None, None, *gradients]
        ctx.mark_non_differentiable(*losses)
        return total, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What `forward` has computed, scaled in place."""
        if ctx.gradients is None:
            raise RuntimeError("the loss holds its gradients for one backward pass; compute the loss again.")
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(None if each is None else each.mul_(grads[0].to(each.dtype)) for each in gradients)


class _Divergence(_Losses):
    """See `distilled`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dtype: torch.dtype, train: bool, temperature: float, scale: Tensor, *inputs: Tensor
    ) -> Tensor:
        """inputs: states and weight of the teacher, then of the student."""
        t_x, t_weight, x, weight = inputs
        teacher, student = t_weight.to(dtype), weight.to(dtype)  # (V, D)
        needs = [train and each for each in ctx.needs_input_grad[6:]]
        d_x = torch.empty_like(x) if needs[0] else None
        d_weight = torch.zeros_like(wide(weight)) if needs[1] else None
        total = wide(x[:0]).new_zeros(())
        with full_precision(x.device.type):
            for rows in _chunks(0, len(x), len(weight), x.device.type):
                own = x[rows].to(dtype)
                log_p = torch.log_softmax(wide(t_x[rows].to(dtype) @ teacher.t()) / temperature, -1)  # (c, V)
                log_q = torch.log_softmax(wide(own @ student.t()) / temperature, -1)
                p, weights = log_p.exp(), scale[rows].to(total.dtype)
                total += temperature**2 * torch.dot(torch.linalg.vecdot(p, log_p.sub_(log_q)), weights)
                error = log_q.exp_().sub_(p).mul_(temperature * weights[:, None]).to(dtype)
                if d_x is not None:
                    d_x[rows] = (error @ student).to(d_x.dtype)
                if d_weight is not None:
                    _add_product_(d_weight, error, own)
        ctx.gradients = [None] * 6 + [d_x, d_weight]
        return total


def distilled(
    teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], scale: Tensor, temperature: float
) -> Tensor:
    """T^2 sum(scale KL(softmax(z_teacher / T) || softmax(z_student / T))) in nats, which can be differentiated once.

    Args:
        teacher: states (M, D) and weight (V, D) of its head; it has no gradients.
        student: the same of the student.
        scale: (M,) float32 weight of each target, of order 1.
        temperature: T.
    """
    inputs = (*(each.detach() for each in teacher), *student)
    return _Divergence.apply(_compute_dtype(student[0]), torch.is_grad_enabled(), temperature, scale, *inputs)


def head_nll(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """-log p of labels under one head.

    Returns sum(scale * nll), which can be differentiated once, and nll (M,) float32 nats, which cannot.
    """
    return _Losses.apply(None, None, _compute_dtype(inputs.x), torch.is_grad_enabled(), *inputs)


def dual_nll(h: HeadInputs, v: HeadInputs, gate: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-log p in float32 nats of M targets that both heads predict, and of those that only one of them does.

    Args:
        h: of the horizontal head: the M common targets, then a others.
        v: of the vertical head: the same M targets, then b others.
        gate: (M,) weight of the horizontal logits (Eq. 8).
        scale: (M,) float32 weight of the losses of the mix.

    Returns:
        The sum of all losses times their scales, which can be differentiated once; and, without gradients,
        fused (M,), horizontal (M + a,), vertical (M + b,).
    """
    return _Losses.apply(gate, scale, _compute_dtype(h.x), torch.is_grad_enabled(), *h, *v)
