"""Both output heads, the fusion gate and the fusion rule: the one module that turns hidden states into logits.

Shapes: B samples, R rows, H, W grid, N cells, S' slots that were fed, D width, V codes, n cells of a step.
Hidden states are (R, 1 + S', D): the last prefix token, then the slots in plan order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.special import entr
from torch.utils.checkpoint import checkpoint

from flashar_pl.grid import DecodePlan
from flashar_pl.models.gates import FusionGate, LogitGate
from flashar_pl.models.intra import IntraHead
from flashar_pl.models.losses import AUX_WEIGHT, HeadInputs, chunk_size, distilled, dual_nll, head_nll
from flashar_pl.models.sources import Corner, Sources, StepSources, by_target, fed_by_slots, sources
from flashar_pl.numerics import wide

Fusion = Literal["gate", "logit_gate", "average"]


class Split(NamedTuple):
    """A loss of both heads in place of that of their mix (the authors' LlamaGen code):
    share mean CE_H + (1 - share) mean CE_V, each over all targets of its head, + column0 mean CE_V over those that the
    vertical head alone predicts."""

    share: float
    column0: float = 0.0


def target_weights(
    plan: DecodePlan,
    where: Sources,
    weight: Tensor,
    aux_weight: float | tuple[float, float],
    split: Split | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How much each target's loss counts: of the mix, of the horizontal head and of the vertical head, (B, N) each.

    weight: (B,) of the samples. Sums over targets of these weights times the losses give N times Eq. 9, or `split`,
    plus aux_weight times Eq. 10. A target that one head alone predicts has that head's loss as its fused one.
    """
    fused = weight[:, None].expand(-1, plan.n_cells)

    def mean_over(cells: Tensor, scale: float) -> Tensor:
        return weight.new_zeros(plan.n_cells).index_fill(0, cells, scale * plan.n_cells / max(1, len(cells)))

    parts, shares = [], (0.0, 0.0) if split is None else (split.share, 1 - split.share)
    pair = aux_weight if isinstance(aux_weight, tuple) else (aux_weight, aux_weight)
    heads = zip(("h_source", "v_source"), (where.only_h, where.only_v), pair, shares, strict=True)
    for source, alone, own, share in heads:
        counted, n = fed_by_slots(plan, source, weight.device)
        each = counted.to(weight.dtype) * (own * plan.n_cells / n)
        if split is None:
            each = each.index_add(0, alone, weight.new_ones(len(alone)))
        else:
            each = each + mean_over(torch.cat([where.both, alone]), share)
        parts.append(fused * each)
    if split is None:
        return fused, parts[0], parts[1]
    return torch.zeros_like(fused), parts[0], parts[1] + fused * mean_over(where.only_v, split.column0)


States = tuple[Tensor, Tensor | None]
"""Final hidden states of the horizontal branch, and of the vertical branch if there is one."""


class Teacher(NamedTuple):
    """The raster model that the vertical head learns from: the horizontal head on causal states."""

    states: Tensor
    """(B, 1 + S', D) of `plan`, without gradients."""
    plan: DecodePlan
    """Raster, of the same grid."""
    weight: float
    """Of the divergence in the loss."""
    temperature: float
    """T."""


def affine(head: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """States (M, D) and weight (V, D) of a head; a bias is one more input that is always 1."""
    if head.bias is None:
        return x, head.weight
    return pad(x, (0, 1), value=1.0), torch.cat([head.weight, head.bias[:, None]], dim=1)


class TargetLosses(NamedTuple):
    """Losses in nats, float32; raster order. A tuple, because FSDP2 looks for the tensors in outputs.

    Only `total` has gradients.
    """

    total: Tensor
    """Scalar: the sum over samples of their weight times (fused loss + N aux_weight (L_H + L_V)), see `losses`."""
    fused: Tensor
    """(B, N)."""
    horizontal: Tensor
    """(B, N); 0 where the horizontal head does not predict."""
    vertical: Tensor
    """(B, N); 0 where the vertical head does not predict."""
    gate: Tensor
    """(B, N), detached."""


class DualHead(nn.Module):
    """Horizontal head, and where there is a second branch the vertical head and the fusion rule."""

    def __init__(
        self,
        horizontal: nn.Linear,
        vertical: nn.Linear | None = None,
        gate: FusionGate | None = None,
        corner: Corner = "horizontal",
        first_code: int = 0,
        intra: IntraHead | None = None,
        time_gate: FusionGate | None = None,
    ) -> None:
        """first_code: row of both heads that scores code 0; the rows before it score text tokens. time_gate: of a
        video, weighs the vertical against the temporal state."""
        super().__init__()
        self.horizontal = horizontal
        self.vertical = vertical
        self.gate = gate
        self.corner: Corner = corner
        self.first_code = first_code
        self.intra = intra
        self.time_gate = time_gate

    @property
    def rules(self) -> tuple[Corner, int]:
        """What decides how a step draws its cells, beside weights: the corner, and the groups of a diagonal."""
        return self.corner, 1 if self.intra is None else self.intra.groups

    def _code_logits(self, head: nn.Linear, states: Tensor) -> Tensor:
        """Logits (..., V) of the codes for states (..., D), in their dtype."""
        return nn.functional.linear(states, *self.code_rows(head)) if self.first_code else head(states)

    def code_rows(self, head: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the codes."""
        return head.weight[self.first_code :], None if head.bias is None else head.bias[self.first_code :]

    def weigh(self, h: Tensor, v: Tensor, corner: bool) -> Tensor:
        """Gate (R, M) float32 for pairs of states (R, M, D): Eq. 7, or 0.5 without a gate.

        corner: whether the first pair is the one that predicts (0, 0). It is a pair like any other here.
        """
        if self.gate is None:
            return torch.full(h.shape[:-1], 0.5, dtype=wide(h[:0]).dtype, device=h.device)
        if not isinstance(self.gate, LogitGate):
            return self.gate(h, v)
        pairs = [each.detach().flatten(0, 1) for each in (h, v)]  # (R M, D)
        size = chunk_size(len(pairs[0]), self.horizontal.out_features, h.device.type)
        chunks = zip(*(each.split(size) for each in pairs), strict=True)
        gates = [
            checkpoint(self._weigh_logits, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks
        ]
        return torch.cat(gates).view(h.shape[:-1])

    def _weigh_logits(self, h: Tensor, v: Tensor) -> Tensor:
        """Gate (c,) of pairs of states (c, D), by their logits, of which the gate alone learns."""
        assert self.vertical is not None and self.gate is not None
        with torch.no_grad():
            logits = self._code_logits(self.horizontal, h), self._code_logits(self.vertical, v)
        return self.gate(*logits)

    def gate_collapse(self, h: Tensor, v: Tensor, where: Sources, gate: Tensor) -> Tensor:
        """1 - mean H2(g) of each sample (B,) over interior cells: H2 the binary entropy of the gate in bits, g clipped
        to [1e-6, 1 - 1e-6]. The states are detached: only the gate has gradients (the authors' code).

        gate: (B, M), of `weigh`.
        """
        if not isinstance(self.gate, LogitGate):
            gate = self.weigh(h[:, where.h[where.both]].detach(), v[:, where.v[where.both]].detach(), where.corner)
        g = gate[:, int(where.corner) :].clamp(1e-6, 1 - 1e-6)
        return 1 - (entr(g) + entr(1 - g)).mean(1) / math.log(2)

    def distillation(self, v: Tensor, where: Sources, weight: Tensor, teacher: Teacher) -> Tensor:
        """N times the teacher's weight times the sum over samples of their weight (B,) times the mean of T^2 KL(teacher
        || vertical head) over the targets below row 0 (the authors' Emu3.5 code). Only v and that head have gradients.
        """
        assert self.vertical is not None
        cells = torch.cat([where.both[int(where.corner) :], where.only_v])
        rows = sources(teacher.plan, self.corner, v.device).h[cells]
        scale = weight[:, None].expand(-1, len(cells)).flatten()
        total = distilled(
            affine(self.horizontal, teacher.states[:, rows].flatten(0, 1)),
            affine(self.vertical, v[:, where.v[cells]].flatten(0, 1)),
            scale,
            teacher.temperature,
        )
        return total * (teacher.weight * teacher.plan.n_cells / max(1, len(cells)))

    def gates(self, h: Tensor, v: Tensor | None, plan: DecodePlan) -> Tensor:
        """Weight of the horizontal logits for every target: (B, N) float32."""
        where = sources(plan, self.corner, h.device)
        gate = torch.ones(h.shape[0], plan.n_cells, dtype=wide(h[:0]).dtype, device=h.device)
        if v is None or self.vertical is None:
            return gate
        gate[:, where.only_v] = 0.0
        gate[:, where.both] = self.weigh(h[:, where.h[where.both]], v[:, where.v[where.both]], where.corner)
        return gate

    def groups(self, plan: DecodePlan) -> bool:
        """Whether the cells of a step are drawn in groups."""
        return self.intra is not None and self.intra.groups > 1 and plan.has_vertical

    def together(self, h: Tensor, v: Tensor | None, embedded: Tensor | None, plan: DecodePlan) -> States:
        """The states (R, 1 + S', D) after what the cells of a diagonal tell one another; embedded codes (R, N, D).
        Of a video (R, N, D), see `by_target`."""
        if v is not None and v.shape[2] > h.shape[2]:  # of a video
            of_step = plan.t_source is not None
            return self.by_target(h, v, by_target(plan, h.device)[0]) if of_step else (h, v.chunk(2, dim=-1)[0])
        if not self.groups(plan):
            return h, v
        assert self.intra is not None and v is not None and embedded is not None
        where = sources(plan, self.corner, h.device)
        by_h, by_v = torch.cat([where.both, where.only_h]), torch.cat([where.both, where.only_v])
        zeros = h.new_zeros(len(h), plan.n_cells, h.shape[2])
        pair = zeros.index_copy(1, by_h, h[:, where.h[by_h]]), zeros.index_copy(1, by_v, v[:, where.v[by_v]])
        delta = self.intra(torch.cat(pair, dim=-1), embedded, plan)
        h = h.index_add(1, where.h[by_h], delta[:, by_h].to(h.dtype))
        return h, v.index_add(1, where.v[by_v], delta[:, by_v].to(v.dtype))

    def by_target(self, h: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The states (R, n, D) that predict n cells of a video, horizontal and vertical, the latter mixed with the
        temporal one: one head scores both, so that a mix of the states is the mix of their logits (Eq. 8).

        v: (R, S', 2D), the states of the vertical and of the temporal branch. rows: (3, n), of `by_target`.
        """
        at = rows.clamp_min(0)
        up, before = (part[:, cells] for part, cells in zip(v.chunk(2, dim=-1), at[1:], strict=True))
        share = wide(h).new_full((1, 1), 0.5) if self.time_gate is None else self.time_gate(up, before)  # (R, n)
        share = share.masked_fill(rows[2] < 0, 1.0).masked_fill((rows[1] < 0) & (rows[2] >= 0), 0.0)
        return h[:, at[0]], torch.lerp(wide(before), wide(up), share[..., None]).to(h.dtype)

    def forward(
        self, h: Tensor, v: Tensor | None, plan: DecodePlan, embedded: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All logits at once: fused, horizontal, vertical (B, N, V) and gate (B, N), float32.

        `fused` and `gate` are by target; `horizontal` and `vertical` are what the heads emit at each cell. h, v must
        hold all S slots. Without a vertical branch, `vertical` equals `horizontal`. embedded (B, N, D): the codes,
        where they are drawn in groups. Of a video `horizontal` and `vertical` are by target too.
        """
        h, v = self.together(h, v, embedded, plan)
        z_h = wide(self._code_logits(self.horizontal, h))  # (B, 1 + S, V)
        z_v = z_h if v is None or self.vertical is None else wide(self._code_logits(self.vertical, v))
        gate = self.gates(h, v, plan)
        where = sources(plan, self.corner, h.device)
        fused = torch.lerp(z_v[:, where.v], z_h[:, where.h], gate[..., None])  # (B, N, V)
        emitted = plan.on("slot", h.device) + (plan.t_source is None)
        return fused, z_h[:, emitted], z_v[:, emitted], gate

    def losses(
        self,
        h: Tensor,
        v: Tensor | None,
        codes: Tensor,
        plan: DecodePlan,
        weight: Tensor | None = None,
        aux_weight: float | tuple[float, float] = AUX_WEIGHT,
        gate_collapse: float = 0.0,
        teacher: Teacher | None = None,
        split: Split | None = None,
        embedded: Tensor | None = None,
    ) -> TargetLosses:
        """Losses of every target of codes (B, N) int64 (Eq. 9, 10), never holding all logits.

        weight: (B,) float32 of each sample, None = 1. L_H and L_V of a sample are means over the targets whose source
        is a slot (Eq. 10). Logits are normalised over all rows of the heads, so over text tokens too where the heads
        score them. embedded: as in `forward`.
        """
        h, v = self.together(h, v, embedded, plan)
        where = sources(plan, self.corner, h.device)
        codes = codes + self.first_code  # rows of the heads
        batch, zeros = h.shape[0], wide(h[:0]).new_zeros(h.shape[0], plan.n_cells)
        weight = torch.ones_like(zeros[:, 0]) if weight is None else weight.to(zeros.dtype)

        def spread(values: Tensor, *cells: Tensor) -> Tensor:
            return torch.cat([values[:, part].flatten(0, 1) for part in cells])  # (B * M, ...)

        def put(values: Tensor, *cells: Tensor) -> Tensor:
            parts = values.split([batch * len(part) for part in cells])
            return zeros.index_copy(1, torch.cat(cells), torch.cat([part.view(batch, -1) for part in parts], dim=1))

        def inputs(head: nn.Linear, states: Tensor, rows: Tensor, scale: Tensor, *cells: Tensor) -> HeadInputs:
            x = torch.cat([states[:, rows[part]].flatten(0, 1) for part in cells])  # (B * M, D)
            return HeadInputs(*affine(head, x), spread(codes, *cells), spread(scale, *cells))

        if v is None or self.vertical is None:
            cells = where.only_h
            assert len(cells) == plan.n_cells, "this plan needs a vertical head"
            total, nll = head_nll(inputs(self.horizontal, h, where.h, weight[:, None].expand_as(zeros), cells))
            nll = put(nll, cells)
            return TargetLosses(total, nll, nll, zeros, torch.ones_like(zeros))
        gates = self.weigh(h[:, where.h[where.both]], v[:, where.v[where.both]], where.corner)  # (B, M)
        gate = gates.flatten()
        by_h, by_v = (where.both, where.only_h), (where.both, where.only_v)
        scale, scale_h, scale_v = target_weights(plan, where, weight, aux_weight, split)
        total, fused, nll_h, nll_v = dual_nll(
            inputs(self.horizontal, h, where.h, scale_h, *by_h),
            inputs(self.vertical, v, where.v, scale_v, *by_v),
            gate,
            spread(scale, where.both),
        )
        if gate_collapse:
            collapse = self.gate_collapse(h, v, where, gates) * weight
            total = total + gate_collapse * plan.n_cells * collapse.sum()
        if teacher is not None:
            total = total + self.distillation(v, where, weight, teacher)
        both = len(fused)
        every = (where.both, where.only_h, where.only_v)
        return TargetLosses(
            total=total,
            fused=put(torch.cat([fused, nll_h[both:], nll_v[both:]]), *every),
            horizontal=put(nll_h, *by_h),
            vertical=put(nll_v, *by_v),
            gate=put(torch.cat([gate, torch.ones_like(nll_h[both:]), torch.zeros_like(nll_v[both:])]), *every).detach(),
        )

    def step(self, h: Tensor, v: Tensor | None, at: StepSources, near: Tensor | None = None) -> Tensor:
        """Fused logits (R, n, V) float32 of one step's cells from the states (R, n', D) that were fed last (Eq. 8).

        Only the logits that some cell needs are computed. The slices are made contiguous: for others matmul becomes a
        batched product and copies the head for every row. The mix is written where the result stands. No gradients.
        near: (3, n) rows for `by_target`, of a step of a video.
        """
        if near is not None and v is not None:
            h, v = self.by_target(h, v, near)
        z_h = self._code_logits(self.horizontal, h[:, at.h].contiguous())  # (R, n - only_v, V)
        if v is None or self.vertical is None or at.v.start == at.v.stop:
            return wide(z_h)
        z_v = self._code_logits(self.vertical, v[:, at.v].contiguous())  # (R, n - only_h, V)
        rows, n_h, vocabulary = z_h.shape
        both = n_h - at.only_h
        if isinstance(self.gate, LogitGate):
            gate = self.gate(z_h[:, at.only_h :], z_v[:, :both])
        else:
            gate = self.weigh(h[:, at.h][:, at.only_h :], v[:, at.v][:, :both], at.corner)
        fused = torch.empty(rows, n_h + at.only_v, vocabulary, dtype=gate.dtype, device=gate.device)
        fused[:, :n_h] = z_h
        fused[:, n_h:] = z_v[:, both:]
        mixed = fused[:, at.only_h : n_h]
        torch.lerp(wide(z_v[:, :both]), mixed, gate[..., None], out=mixed)
        return fused

    def draw_step(self, h: Tensor, v: Tensor, at: StepSources, take: Callable[[Tensor, slice], Tensor]) -> None:
        """One step's cells in groups that see one another. take: of the fused logits (R, m, V) of the cells of a slice
        of the step makes their embedded codes (R, m, D)."""
        assert self.intra is not None
        s = torch.cat([pad(h[:, at.h], (0, 0, 0, at.only_v)), pad(v[:, at.v], (0, 0, at.only_h, 0))], dim=-1)
        n, known = s.shape[1], self.intra.meet(s)
        for cells in (parts := self.intra.parts(n)):
            places = range(n)[cells]
            only_h = sum(place < at.only_h for place in places)
            only_v = sum(place >= n - at.only_v for place in places)
            by_h, by_v = slice(0, len(places) - only_v), slice(0, len(places) - only_h)
            states = s[:, cells].unflatten(2, (2, -1)) + self.intra.delta(known[:, cells])[:, :, None].to(s.dtype)
            left, up = states[:, by_h, 0], states[:, only_h:, 1]
            at_group = StepSources(by_h, by_v, only_h, only_v, corner=False)
            embedded = take(DualHead.step(self, left, up, at_group), cells)  # self.step would end a shard's gathering
            if cells != parts[-1]:
                known = self.intra.tell(known, cells, embedded)
