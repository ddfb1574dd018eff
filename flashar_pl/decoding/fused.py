"""The loop of `flashar_pl.decoding.loop` by own kernels: five a layer, three a step (`flashar_pl.layers.kernels`).

The prefix and the logits of step 0 are the model's own operators; so is the embedding of drawn codes. What a step does
depends on `Fused.kind` of it alone, and on numbers in device memory: steps of one kind share one CUDA graph, all of a
raster decoding but a few.

Shapes: B samples, R rows (B, or 2B with guidance), P prefix, n cells of a step, n' slots fed, M = R n', D width,
V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import is_causal
from flashar_pl.decoding.graphs import captured, warmed
from flashar_pl.decoding.loop import Buffers, Inputs, Progress
from flashar_pl.grid import ROW_END, DecodePlan
from flashar_pl.layers.kernels.launch import launch, why_not
from flashar_pl.layers.kernels.tiles import head_tile, power_of_two, tile
from flashar_pl.layers.transformer import Block, HeadNorm, RMSNorm
from flashar_pl.models.base import GridModel
from flashar_pl.models.dual_head import DualHead
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.gates import LogitGate
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.sources import step_sources
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import MIN_TEMPERATURE, guide

PROGRAMS = 264
"""Programs that attention is split into where it has fewer heads and rows: two for every multiprocessor of an H200."""
MIN_KEYS = 64
"""Keys of a part at least."""


def refusal(model: GridModel) -> str | None:
    """Why the kernels cannot decode with `model` where it is; None = they can."""
    if model.own_decoding or not any(_is_common(model, "states", owner) for owner in (RasterAR, FlashAR)):
        return f"a {model.config()['kind']} model has layers or steps of its own"
    if type(model).step_logits is not GridModel.step_logits or type(model.dual_head).step is not DualHead.step:
        return f"a {model.config()['kind']} model has logits of its own"
    if isinstance(model, FlashAR) and model.vertical_sees_prefix and not _is_common(model, "vertical_states", FlashAR):
        return f"a {model.config()['kind']} model has a vertical branch of its own"
    if isinstance(model.dual_head.gate, LogitGate):
        return "the gate reads logits"
    if model.dual_head.intra is not None and model.dual_head.intra.groups > 1:
        return "the model draws the codes of a diagonal in groups"
    if (model.frames or 1) > 1:
        return "the model has a third branch, for videos"
    config = model.backbone.block
    if config.norm_place != "before":
        return f"norms stand {config.norm_place!r} in the blocks, and the kernels expect them before"
    if config.norm != "rms" or config.activation != "silu":
        return f"the blocks have {config.norm} norms and {config.activation}, and the kernels rms norms and silu"
    if config.text_ffn or config.text_passes:
        return "text is treated otherwise than codes"
    if config.head_dim % 2:
        return f"the head width {config.head_dim} is odd"
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    heads = [each for each in (model.dual_head.horizontal, model.dual_head.vertical) if each is not None]
    linears = [each for block in blocks for each in _linears(block)] + heads
    if any(type(each) is not nn.Linear or type(each.weight) is not nn.Parameter for each in linears):
        return "the weights are packed, quantised, sharded or adapted, and the kernels read plain ones"
    if any(type(block) is not Block for block in blocks) or len(blocks) != model.cache_spec().n_layer:
        return "the blocks are not the common ones"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return "the parameters have several dtypes"
    return why_not(model.device)


def can_decode(plan: DecodePlan) -> bool:
    """Whether its slots see whole steps or all slots up to their own, and its steps are those of the loop."""
    return plan.name != "lossless" and (not isinstance(plan.visible, Tensor) or is_causal(plan))


def _is_common(model: GridModel, name: str, owner: type) -> bool:
    return getattr(type(model), name) is getattr(owner, name)


def _linears(block: Block) -> tuple[Any, ...]:
    attention, feed_forward = block.attention, block.feed_forward
    return attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2


class Fused:
    """One batch on its way through a decoding: `begin`, then `step` for every t.

    All that steps exchange stays at one place: graphs of one step serve others.
    """

    def __init__(
        self, model: GridModel, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs, buffers: Buffers
    ) -> None:
        self.model, self.plan, self.settings, self.inputs, self.buffers = model, plan, settings, inputs, buffers
        assert can_decode(plan), f"kernels know no {plan.name} plan"
        assert not model.dual_head.groups(plan), "kernels draw a diagonal at once"
        assert inputs.noise.is_contiguous() and inputs.rope[0].is_contiguous(), "kernels read them as they are written"
        x, length = inputs.prefix.x, len(inputs.prefix)
        self.rows, self.batch, self.length = len(x), len(buffers.drawn), length
        widths = {part.stop - part.start for part in plan.slots_of_step}
        self.widest = max(widths)
        self.guided = model.guided_steps(plan, settings)
        self.last = max((t for t, on in enumerate(self.guided) if on), default=-1)
        self.sources = step_sources(plan, model.dual_head.corner)
        starts = [[done, length + part.start] for done, part in zip(plan.cells_before, plan.slots_of_step)]
        self.places = torch.tensor(starts, dtype=torch.int32).to(x.device)
        self.clock, self.now = (torch.zeros((), dtype=torch.int32, device=x.device) for _ in range(2))
        self.first = x.new_zeros(self.rows, dtype=torch.int32)
        self.image = torch.full_like(self.first, length)
        state = x.new_empty(self.rows * self.widest, x.shape[2])
        self.h, self.v = state, torch.empty_like(state) if plan.has_vertical else None
        self.q = x.new_empty(len(state), model.backbone.block.n_head * model.backbone.block.head_dim)
        self.y, self.middle = torch.empty_like(self.q), x.new_empty(len(state), model.backbone.block.ffn_dim)
        self.fed = {n: torch.full((self.batch, n), ROW_END, device=x.device) for n in widths}
        self.accumulate = torch.promote_types(x.dtype, torch.float32)
        self.split = _Split(self)

    def begin(self) -> None:
        """The prefix."""
        inputs, buffers, model = self.inputs, self.buffers, self.model
        buffers.cache.restart()
        buffers.broken.zero_()
        self.clock.zero_()
        self.now.zero_()
        if inputs.prefix.mask is None:
            self.first.zero_()
        else:
            self.first.copy_(self.length - inputs.prefix.lengths)
        mask = model.backbone.sequence_mask(self.plan, inputs.prefix, 0)
        rope = inputs.rope[:, : self.length]
        self.states = model.prefill(inputs.prefix.x, rope, mask, buffers.cache, self.plan.has_vertical)

    def kind(self, t: int) -> tuple[Any, ...]:
        """What the work of step t depends on, beside numbers on the device."""
        fed, before = (self.plan.slots_of_step[i] for i in (t, max(t - 1, 0)))
        n_fed = 0 if t + 1 == self.plan.n_steps else fed.stop - fed.start
        of_h, of_v = ((part.start, part.stop) for part in (self.sources[t].h, self.sources[t].v))
        where = (before.stop - before.start, of_h, of_v, self.sources[t].only_h, self.sources[t].only_v)
        return t == 0, len(self.plan.cells_of_step[t]), where, n_fed, self.guided[t], self._rows(t - 1), self._rows(t)

    def _rows(self, t: int) -> int:
        """R of the positions that step t feeds: guidance does not come back."""
        return self.rows if t < self.last else self.batch

    def step(self, t: int) -> None:
        """Draw the cells of step t, and feed them."""
        n = len(self.plan.cells_of_step[t])
        z = self._first_logits() if t == 0 else self._logits(t, n)
        slots = self.plan.slots_of_step[t]
        n_fed = slots.stop - slots.start
        self._choose(z, n, self.fed[n_fed])
        if t + 1 < self.plan.n_steps:
            rows = self._rows(t)
            self._feed(self.model.embed(self.fed[n_fed].repeat(rows // self.batch, 1)), rows, n_fed)

    def _first_logits(self) -> Tensor:
        """(B n, V) float32 guided logits of step 0 at the temperature, by the model."""
        logits = self.model.step_logits(self.states, self.plan, 0)
        b, scale = self.batch, self.settings.scale
        z = guide(logits[:b], logits[b:], scale) if self.guided[0] else logits[:b]
        if not self.settings.greedy and self.settings.temperature != 1:
            z = z / max(self.settings.temperature, MIN_TEMPERATURE)
        return z.flatten(0, 1).float().contiguous()

    def _logits(self, t: int, n: int) -> Tensor:
        from flashar_pl.layers.kernels import heads

        head, at, model, settings = self.model.dual_head, self.sources[t], self.model, self.settings
        before = self.plan.slots_of_step[t - 1]
        n_states = before.stop - before.start
        rows, guided = self.batch * (2 if self.guided[t] else 1), self.guided[t]
        h, h_gain, h_eps = self._normed(self.h, model.backbone.norm)
        v, v_gain, v_eps = h, h_gain, h_eps
        mixes = head.vertical is not None and at.v.start != at.v.stop
        if mixes:
            v, v_gain, v_eps = self._normed(self.v, cast(FlashAR, model).vertical.norm)
        n_pairs = n - at.only_h - at.only_v
        mode, blocks, sums, gate_bias = "horizontal", 0, self.places, self.places
        if mixes:
            mode = "average" if head.gate is None else "gate"
        if mode == "gate" and n_pairs:
            sums, blocks = self._gate(h, v, h_gain, v_gain, rows, n_pairs, n_states, at, h_eps, v_eps)
        if head.gate is not None:
            gate_bias = head.gate.out.bias
        (w_h, b_h), (w_v, b_v) = head.code_rows(head.horizontal), head.code_rows(head.vertical or head.horizontal)
        z = torch.empty(self.batch * n, len(w_h), dtype=torch.float32, device=h.device)
        cut = head_tile(len(z), 32)
        hot = 1.0 if settings.greedy else max(settings.temperature, MIN_TEMPERATURE)
        launch(
            heads.logits, (-(-len(w_h) // cut.n), -(-len(z) // cut.m)),
            h, v, h_gain, v_gain, w_h, w_v, w_h if b_h is None else b_h, w_v if b_v is None else b_v, sums, gate_bias,
            z, self.clock, self.now, self.batch, n, len(w_h), n_states, at.h.start, at.v.start, at.only_h, at.only_v,
            rows * n_pairs, h_eps, v_eps, float(settings.scale), float(hot),
            D=h.shape[1], NORM=h_gain is not h, BIAS=b_h is not None, GUIDED=guided, MODE=mode, BLOCKS=blocks,
            BM=cut.m, BN=cut.n, BK=cut.k, ACC=self._acc(), **cut.options,
        )  # fmt: skip
        return z

    def _normed(self, x: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor, float]:
        """States, the final norm's weight and its epsilon; the states themselves as weight where they are normed."""
        assert x is not None
        if type(norm) is RMSNorm and norm.scale == 1:
            return x, norm.weight, norm.eps
        made = norm(x)
        return made, made, 0.0

    def _gate(self, h: Tensor, v: Tensor, h_gain: Tensor, v_gain: Tensor, rows: int, n_pairs: int, n_states: int,
              at: Any, h_eps: float, v_eps: float) -> tuple[Tensor, int]:  # fmt: skip
        from flashar_pl.layers.kernels import heads

        gate = self.model.dual_head.gate
        assert gate is not None
        hidden, pairs = gate.hidden.out_features, rows * n_pairs
        cut = head_tile(pairs, 16)
        blocks = -(-hidden // cut.n)
        sums = torch.empty(blocks, pairs, dtype=self.accumulate, device=h.device)
        launch(
            heads.gate, (blocks, -(-pairs // cut.m)),
            h, v, h_gain, v_gain, gate.hidden.weight, gate.out.weight, sums, pairs, n_pairs, n_states,
            at.h.start + at.only_h, at.v.start, h_eps, v_eps, hidden,
            D=h.shape[1], NORM=h_gain is not h, BM=cut.m, BN=cut.n, BK=cut.k, ACC=self._acc(), **cut.options,
        )  # fmt: skip
        return sums, blocks

    def _choose(self, z: Tensor, n: int, fed: Tensor) -> None:
        from flashar_pl.layers.kernels import heads

        settings, drawn, vocabulary = self.settings, self.buffers.drawn, z.shape[1]
        filtered = not settings.greedy
        launch(
            heads.choose, (len(z),), z, self.inputs.noise, drawn, fed, self.buffers.broken.view(torch.uint8),
            self.places, self.now, self.clock, n, vocabulary, drawn.shape[1], fed.shape[1],
            settings.top_k, float(settings.top_p),
            GREEDY=settings.greedy, TOP_K=filtered and 0 < settings.top_k < vocabulary,
            TOP_P=filtered and settings.top_p < 1, BLOCK=min(1024, power_of_two(vocabulary)), num_warps=8,
        )  # fmt: skip

    def _feed(self, x: Tensor, rows: int, n: int) -> None:
        """The embedded codes (R, n', D) through the layers; the branches end in `h` and `v`."""
        model, m = self.model, rows * n
        backbone, blocks = model.backbone, cast(list[Block], list(model.backbone.blocks))
        branch = model.branch_layer if isinstance(model, FlashAR) and self.plan.has_vertical else len(blocks)
        trunk = x.reshape(m, -1).contiguous()
        for layer, block in enumerate(blocks[:branch]):
            self._block(block, layer, trunk, trunk, rows, n, self.first)
        h = self.h[:m]
        self._branch(blocks[branch:], branch, trunk, h, rows, n, self.first)
        if self.v is not None:
            flashar = cast(FlashAR, model)
            first = self.first if flashar.vertical_sees_prefix else self.image
            self._branch(list(flashar.vertical.blocks), backbone.n_layer, trunk, self.v[:m], rows, n, first)

    def _branch(self, blocks: list[Any], layer: int, x: Tensor, out: Tensor, rows: int, n: int, first: Tensor) -> None:
        if not blocks:
            out.copy_(x)
        for i, block in enumerate(blocks):
            self._block(block, layer + i, x, out, rows, n, first)
            x = out

    def _block(self, block: Any, layer: int, x: Tensor, out: Tensor, rows: int, n: int, first: Tensor) -> None:
        """out (M, D) of x (M, D); they may be one."""
        from flashar_pl.layers.kernels import block as kernels

        config, m, acc = block.attention.config, len(x), self._acc()
        wqkv, wo, w13, w2 = _linears(block)
        keys, values = self.buffers.cache.keys[layer], self.buffers.cache.values[layer]
        strides = keys.stride(0), keys.stride(1)
        heads, width = config.n_head + 2 * config.n_kv_head, config.head_dim
        cut = tile(m, pairs=True)
        pairs = power_of_two(width // 2) if config.qk_norm != "none" else min(cut.n, power_of_two(width // 2))
        rope = self.inputs.rope
        where = self.places, self.now
        launch(
            kernels.norm_qkv, (heads * -(-(width // 2) // pairs), -(-m // cut.m)),
            x, block.attention_norm.weight, wqkv.weight, _bias(wqkv), *_head_norm(block.attention.q_norm, wqkv),
            *_head_norm(block.attention.k_norm, wqkv), rope, *where, self.q, keys, values, m, n, config.norm_eps,
            0 if len(rope) == 1 else rope.stride(0), *strides,
            D=config.dim, A=config.n_head, G=config.n_kv_head, E=width, INTERLEAVED=config.rope_interleaved,
            QK_NORM=config.qk_norm, BIAS=wqkv.bias is not None, BM=cut.m, BP=max(16, pairs), BK=cut.k, ACC=acc,
            **cut.options,
        )  # fmt: skip
        self.split.attend(config, keys, values, first, where, rows, n, isinstance(self.plan.visible, Tensor))
        cut = tile(m)
        launch(
            kernels.project, (-(-config.dim // cut.n), -(-m // cut.m)), self.y, wo.weight, _bias(wo), x, out,
            m, config.dim, K=wo.in_features, BIAS=wo.bias is not None, SCALED=False, BM=cut.m, BN=cut.n, BK=cut.k,
            ACC=acc, **cut.options,
        )  # fmt: skip
        two = tile(m, pairs=True)
        launch(
            kernels.norm_swiglu, (-(-config.ffn_dim // two.n), -(-m // two.m)), out, block.ffn_norm.weight, w13.weight,
            _bias(w13), self.middle, m, config.ffn_dim, config.norm_eps, D=config.dim, BIAS=w13.bias is not None,
            BM=two.m, BN=two.n, BK=two.k, ACC=acc, **two.options,
        )  # fmt: skip
        launch(
            kernels.project, (-(-config.dim // cut.n), -(-m // cut.m)), self.middle, w2.weight, _bias(w2), out, out,
            m, config.dim, K=config.ffn_dim, BIAS=w2.bias is not None, SCALED=False, BM=cut.m, BN=cut.n, BK=cut.k,
            ACC=acc, **cut.options,
        )  # fmt: skip

    def _acc(self) -> Any:
        import triton.language as tl

        return tl.float64 if self.accumulate == torch.float64 else tl.float32


class _Split:
    """Attention of a `Fused`, and the memory where parts of the keys wait for one another."""

    def __init__(self, fused: Fused) -> None:
        config, device = fused.model.backbone.block, fused.q.device
        self.fused, self.groups = fused, config.n_kv_head
        queries = config.n_head // config.n_kv_head * fused.widest
        self.queries = min(64, max(16, power_of_two(queries)))
        tiles = fused.rows * config.n_kv_head * -(-queries // self.queries)
        length = fused.length + fused.plan.n_inputs
        self.parts = max(1, min(PROGRAMS // tiles, length // MIN_KEYS))
        self.width = max(16, power_of_two(config.head_dim))
        tiles = max(tiles, fused.rows * config.n_kv_head * -(-queries // 16)) if self.parts > 1 else 1
        room = tiles * self.parts * self.queries
        self.part = torch.empty(room, self.width, dtype=fused.accumulate, device=device)
        self.peaks, self.totals = torch.empty(2, room, dtype=fused.accumulate, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def attend(self, config: Any, keys: Tensor, values: Tensor, first: Tensor, where: tuple[Tensor, Tensor], rows: int,
               n: int, causal: bool) -> None:  # fmt: skip
        """From the queries `q` of M = R n positions to `y`."""
        from flashar_pl.layers.kernels import block as kernels

        queries = config.n_head // config.n_kv_head * n
        size = min(64, max(16, power_of_two(queries)))
        launch(
            kernels.attend, (rows * self.groups, self.parts, -(-queries // size)),
            self.fused.q, keys, values, first, *where, self.fused.y, self.part, self.peaks, self.totals, self.arrived,
            n, config.head_dim**-0.5, keys.stride(0), keys.stride(1),
            A=config.n_head, G=config.n_kv_head, E=config.head_dim, EP=self.width, SPLITS=self.parts, CAUSAL=causal,
            BQ=size, BK=32, ACC=self.fused._acc(), num_warps=4, num_stages=3,
        )  # fmt: skip


def _bias(linear: nn.Linear) -> Tensor:
    """Its bias, or something in its place."""
    return linear.weight if linear.bias is None else linear.bias


def _head_norm(norm: nn.Module, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm of queries or keys, or something in their place."""
    if isinstance(norm, HeadNorm):
        return norm.weight, norm.bias
    return (norm.weight, norm.weight) if isinstance(norm, RMSNorm) else (linear.weight, linear.weight)


def decode_fused(
    model: GridModel, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs, buffers: Buffers
) -> Generator[int]:
    """As `flashar_pl.decoding.loop.decode`, without graphs."""
    fused = Fused(model, plan, settings, inputs, buffers)
    fused.begin()
    for t in range(plan.n_steps):
        fused.step(t)
        yield t


class FusedRecording:
    """A `Fused` as CUDA graphs, one for every kind of step; see `flashar_pl.decoding.graphs.Recording`."""

    def __init__(self, model: GridModel, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs) -> None:
        self.plan, self.inputs = plan, inputs.clone()
        self.buffers = Buffers.allocate(model, plan, inputs)
        self.fused = fused = Fused(model, plan, settings, self.inputs, self.buffers)
        kinds = {fused.kind(t): t for t in reversed(range(plan.n_steps))}  # with their first steps
        device, pool = inputs.prefix.x.device, torch.cuda.graph_pool_handle()

        def one_of_each() -> None:
            fused.begin()
            for t in sorted(kinds.values()):
                fused.step(t)

        with warmed(device, one_of_each) as stream:
            self.prefix = captured(fused.begin, pool, stream)
            steps = sorted(kinds.items(), key=lambda kind_and_step: kind_and_step[1])
            self.graphs = {kind: captured(partial(fused.step, t), pool, stream) for kind, t in steps}

    def replay(self, inputs: Inputs, on_step: Callable[[Progress], object]) -> Buffers:
        """Decode other inputs of the same shapes. The next replay overwrites the result."""
        self.inputs.copy_(inputs)
        self.prefix.replay()
        for t in range(self.plan.n_steps):
            self.graphs[self.fused.kind(t)].replay()
            on_step(Progress(self.plan, t + 1, self.buffers.drawn))
        return self.buffers
