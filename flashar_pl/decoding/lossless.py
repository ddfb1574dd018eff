"""Lossless decoding: several codes of the raster order per forward, each the one that raster decoding draws.

Jacobi decoding with shared noise (Teng et al., 2024; Song et al., 2021): a forward feeds the last certain slot and
guesses for those after it, and draws every next slot with that slot's own uniform. A draw is what raster decoding
draws as long as all guesses before it were right, so the run of right guesses and one more code are accepted,
whoever guessed. The other draws are the next guesses. Samples advance at their own pace, each in its own window.

Shapes: B samples, R rows (B, or 2B with guidance), P prefix, S slots, w slots of a window, T = S + w + a row of slots,
K = P + S + w cached positions, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashar_pl.decoding.loop import Buffers, Inputs, Progress
from flashar_pl.grid import ROW_END, DecodePlan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.models.base import GridModel
from flashar_pl.models.sources import StepSources
from flashar_pl.options import Drafter, SamplingSettings
from flashar_pl.sampling import choose, guide

Record = Callable[[Callable[[], object]], torch.cuda.CUDAGraph | None]


class WindowCache(KVCache):
    """A cache in which every row writes at places of its own, over what stood there.

    Once `place` is set, all K positions are visible: a mask must hide those that hold nothing yet, or old guesses.
    """

    def __init__(self, spec: CacheSpec, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(spec, rows, length, dtype, device)
        self._memory.zero_()  # hidden positions have weight 0, and 0 times NaN would be NaN

    def restart(self) -> None:
        super().restart()
        self.place: Tensor | None = None  # (R, w) int64: positions of the next forward

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.place is None:
            return super().append(layer, keys, values)
        index = self.place[:, None, :, None].expand_as(keys)  # (R, G, w, E)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)
        return self.keys[layer], self.values[layer]

    def advance(self, n: int) -> None:
        if self.place is None:
            super().advance(n)


class Lossless:
    """Buffers of batches of one kind, and the step that all forwards but the prefix's repeat.

    Args:
        inputs: of the first batch; later ones have the same shapes.
        drafter: who guesses, see `EngineOptions`. "vertical" needs a vertical branch.
        window_rows: height of the window in rows of the grid; w has the row-end slots besides.
        graph: makes a graph of the step, or returns None where that fails; None = it is not tried.
    """

    def __init__(self, model: GridModel, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs,
                 drafter: Drafter, window_rows: int, graph: Record | None) -> None:  # fmt: skip
        if drafter == "vertical" and model.dual_head.vertical is None:
            raise ValueError(f"drafter is {drafter!r}, and this model has no vertical branch; expected above.")
        if drafter == "vertical" and (model.frames or 1) > 1:
            raise ValueError("drafter is 'vertical', and the model draws videos; expected above.")
        if model.sharded:
            raise ValueError("the plan is lossless, and the model is sharded: its ranks would need unlike numbers of "
                             "forwards; expected raster.")  # fmt: skip
        self.model, self.plan, self.settings, self.drafter, self._record = model, plan, settings, drafter, graph
        x, (batch, _) = inputs.prefix.x, inputs.noise.shape
        device, self.stride = x.device, plan.width + (plan.n_slots > plan.n_cells)
        self.window, self.length = min(window_rows * self.stride, plan.n_slots), x.shape[1]
        self.total = plan.n_slots + self.window + self.stride
        at = torch.arange(self.total, device=device)
        self.forced = ~torch.isin(at, plan.on("slot", device))  # (T,) bool: row ends, and what lies behind the grid
        self.forced[plan.n_slots :] = False
        self.guided = torch.zeros(self.total, dtype=torch.bool, device=device)  # (T,)
        self.guided[plan.on("slot", device)] = torch.tensor(model.guided_steps(plan, settings), device=device)
        self.inputs = inputs.clone()
        self.cache = WindowCache(model.cache_spec(), len(x), self.length + self.total - self.stride, x.dtype, device)
        self.codes = torch.zeros(batch, self.total, dtype=torch.int64, device=device)  # certain ones, then guesses
        self.uniforms = torch.zeros(batch, self.total, dtype=torch.float64, device=inputs.noise.device)
        self.rope = torch.cat([inputs.rope, inputs.rope[:, -1:].repeat(1, self.window, 1, 1)], dim=1)
        self.broken = torch.zeros(batch, self.total, dtype=torch.bool, device=device)
        self.certain = torch.ones(batch, dtype=torch.int64, device=device)  # slots whose codes are final
        self.forwards = torch.zeros(batch, dtype=torch.int64, device=device)
        """(B,) int64: forwards that each sample of the last batch took, the prefix's included."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, inputs: Inputs, on_step: Callable[[Progress], object]) -> Buffers:
        """Decode a batch; the next one overwrites the result. on_step: called once for every cell that is certain in
        all samples."""
        plan, slots = self.plan, self.plan.on("slot", self.codes.device)
        self._begin(inputs)
        cells = plan.slot.tolist()
        done = 0
        while True:
            certain = int(self.certain.min())  # the only wait for the device
            while done < plan.n_cells and cells[done] < certain:
                done += 1
                on_step(Progress(plan, done, self.codes[:, slots]))
            if done == plan.n_cells:
                break
            if self._record is not None:
                state = [each.clone() for each in self._state]
                self._graph, self._record = self._record(self._step), None
                for each, kept in zip(self._state, state, strict=True):
                    each.copy_(kept)  # recording has run the step
            self._step() if self._graph is None else self._graph.replay()
        return Buffers(self.cache, self.codes[:, slots], self.broken.any(0)[slots])

    @property
    def _state(self) -> list[Tensor]:
        """What a step changes and reads again."""
        return [self.codes, self.certain, self.forwards, self.broken]

    def _begin(self, inputs: Inputs) -> None:
        """Feed the prefix and draw the first code; it is the first guess everywhere, too."""
        self.inputs.copy_(inputs)
        prefix, model, plan = self.inputs.prefix, self.model, self.plan
        self.uniforms[:, plan.on("slot", self.uniforms.device)] = self.inputs.noise
        self.rope[:, : self.inputs.rope.shape[1]].copy_(self.inputs.rope)
        self.cache.restart()
        mask = model.backbone.sequence_mask(plan, prefix, 0)
        rope = self.rope[:, : self.length]
        h, _ = model.prefill(prefix.x, rope, mask, self.cache, self.drafter == "vertical")
        at = torch.zeros(len(self.codes), 1, dtype=torch.int64, device=self.codes.device)
        logits = self._logits(model.dual_head.step(h, None, _horizontal(1)), at)
        self.codes.copy_(self._choose(logits, at).expand_as(self.codes))
        self.codes.masked_fill_(self.forced, ROW_END)
        self.broken.zero_().scatter_(1, at, ~logits.amax(-1).isfinite())
        self.certain.fill_(1)
        self.forwards.fill_(1)

    def _step(self) -> None:
        """One forward of every sample's window. Shapes and control flow never depend on values."""
        w, last = self.window, self.plan.n_slots
        turn = torch.arange(w, device=self.codes.device)
        at = self.certain[:, None] - 1 + turn  # (B, w): slots that are fed
        to = at + 1  # those they predict
        h, v = self._feed(at)
        logits = self._logits(self.model.dual_head.step(h, None, _horizontal(w)), to)  # (B, w, V)
        drawn = self._choose(logits, to)  # (B, w)
        right = (self.codes.gather(1, to) == drawn).cumprod(1)
        accepted = 1 + right[:, :-1].sum(1)  # (B,)
        bad = ~logits.amax(-1).isfinite() & (turn < accepted[:, None]) & (to < last)
        self.broken.scatter_(1, to, bad)
        self.codes.scatter_(1, to + self.stride, drawn)  # the code above, until there is a better guess
        if v is not None:  # the vertical branch guesses the row below
            sources, below = StepSources(slice(0, 0), slice(0, w), 0, w, False), at + self.stride
            guesses = self._choose(self._logits(self.model.dual_head.step(h, v, sources), below), below)
            self.codes.scatter_(1, below, guesses)
        self.codes.scatter_(1, to, drawn)
        self.forwards += self.certain < last
        self.certain.add_(accepted).clamp_(max=last)

    def _feed(self, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """States (R, w, D) of the slots at (B, w)."""
        codes, rows = self.codes.gather(1, at), len(self.inputs.prefix.x)
        at, codes = (each.repeat(rows // len(at), 1) for each in (at, codes))
        self.cache.place = place = self.length + at  # (R, w)
        rope = self.rope.expand(rows, -1, -1, -1).gather(1, place[..., None, None].expand(-1, -1, *self.rope.shape[2:]))
        self.cache.filled = self.cache.keys.shape[3] - self.window  # all are visible: some models count them
        positions = torch.arange(self.cache.keys.shape[3], device=at.device)
        mask = positions <= place[..., None]  # (R, w, K)
        if self.inputs.prefix.mask is not None:
            image = mask.new_ones(1, 1).expand(rows, len(positions) - self.length)
            mask = mask & torch.cat([self.inputs.prefix.mask, image], dim=1)[:, None]
        return self.model.step(codes, rope, mask[:, None], self.cache, self.drafter == "vertical")

    def _logits(self, logits: Tensor, at: Tensor) -> Tensor:
        """Logits (R, n, V) with guidance where the slots at (B, n) have it: (B, n, V)."""
        batch = len(at)
        if len(logits) == batch:
            return logits
        away = guide(logits[:batch], logits[batch:], self.settings.scale)
        return torch.where(self.guided[at][..., None], away, logits[:batch])

    def _choose(self, logits: Tensor, at: Tensor) -> Tensor:
        """Codes (B, n) of the slots at (B, n), drawn with their uniforms; the token of a row end is forced."""
        drawn = choose(logits, self.uniforms.gather(1, at.to(self.uniforms.device)), self.settings)
        return self.model.agreed(drawn).masked_fill(self.forced[at], ROW_END)


def _horizontal(n: int) -> StepSources:
    """The horizontal head of n states."""
    return StepSources(slice(0, n), slice(0, 0), n, 0, False)
