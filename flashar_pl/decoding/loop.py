"""The decoding loop: one for every plan, model and guidance setting, over a static KV cache in plan order.

Step t draws all its cells at once from the states of step t - 1, then feeds them (Sec. 4.4). The last step is never
fed. With guidance the unconditional rows stand below the conditional ones in the same batch. Who drives the loop, and
where its buffers live, is the matter of `flashar_pl.decoding.engine`.

Shapes: B samples, R rows (B, or 2B with guidance), P prefix, S' slots that are fed, K = P + S', N cells, n cells of a
step, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.condition import Prefix
from flashar_pl.grid import ROW_END, DecodePlan
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.models.base import GridModel, States
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import choose, guide, unusable


@dataclass(frozen=True)
class Inputs:
    """All that one image batch brings. The loop reads nothing else that changes from batch to batch."""

    prefix: Prefix
    """Of R rows."""
    rope: Rope
    """(1 or R, P + S, E / 2, 2) float32."""
    noise: Tensor
    """(B, N) float64 uniforms in plan order."""

    def shapes(self) -> tuple[Any, ...]:
        """Shape and dtype of every tensor."""
        return tuple((tensor.shape, tensor.dtype) for tensor in self._tensors())

    def clone(self) -> Inputs:
        """The same values in memory of their own."""
        x, lengths, rope, noise, *mask = (tensor.clone() for tensor in self._tensors())
        return Inputs(Prefix(x, lengths, mask[0] if mask else None), rope, noise)

    def copy_(self, other: Inputs) -> None:
        """Take over the values of inputs of the same shapes."""
        for tensor, new in zip(self._tensors(), other._tensors(), strict=True):
            tensor.copy_(new)

    def _tensors(self) -> list[Tensor]:
        tensors = [self.prefix.x, self.prefix.lengths, self.rope, self.noise]
        return tensors if self.prefix.mask is None else [*tensors, self.prefix.mask]


@dataclass(frozen=True)
class Buffers:
    """What the loop writes."""

    cache: KVCache
    drawn: Tensor
    """(B, N) int64 codes in plan order."""
    broken: Tensor
    """(n_steps,) bool: whether the step's logits were NaN or infinite."""

    @classmethod
    def allocate(
        cls, model: GridModel, plan: DecodePlan, inputs: Inputs, cache_dtype: torch.dtype | None = None
    ) -> Buffers:
        """For batches of the same shapes as `inputs`. cache_dtype None = the model's."""
        x = inputs.prefix.x
        cache = KVCache(model.cache_spec(), len(x), x.shape[1] + plan.n_inputs, cache_dtype or x.dtype, x.device)
        drawn = torch.empty(inputs.noise.shape, dtype=torch.int64, device=x.device)
        return cls(cache, drawn, torch.empty(plan.n_steps, dtype=torch.bool, device=drawn.device))


@dataclass(frozen=True)
class Progress:
    """A batch between two steps: what `on_step` is given."""

    plan: DecodePlan
    steps: int
    """Finished ones, 1 to plan.n_steps; the device may be some behind."""
    drawn: Tensor
    """(B, N) int64 codes in plan order; only those of finished steps count."""

    def codes(self) -> Tensor:
        """Codes (B, H, W) int64; -1 where a later step draws them."""
        plan = self.plan
        done = int((plan.step < self.steps).sum())
        codes = torch.full_like(self.drawn, -1)
        codes[:, plan.on("order", codes.device)[:done]] = self.drawn[:, :done]
        return codes.view(-1, plan.height, plan.width)


def decode(
    model: GridModel,
    plan: DecodePlan,
    settings: SamplingSettings,
    inputs: Inputs,
    buffers: Buffers,
    prefill: Callable[..., States] | None = None,
) -> Generator[int]:
    """Fill `buffers` step by step; yields t after the codes of step t are drawn.

    Shapes and control flow depend on plan, settings and shapes alone, never on values, and nothing waits for the
    device: what runs between two yields can be recorded once and replayed with other inputs in the same memory.
    prefill: instead of the model's; what it does may depend on values.
    """
    cache, drawn = buffers.cache, buffers.drawn
    cache.restart()
    prefix, rope = inputs.prefix, inputs.rope
    batch, rows, length = len(drawn), len(prefix.x), len(prefix)
    vertical = plan.has_vertical
    if prefill is None:
        mask = model.backbone.sequence_mask(plan, prefix, 0)
        states = model.prefill(prefix.x, rope[:, :length], mask, cache, vertical)
    else:
        states = prefill(model, plan, inputs, cache, vertical)
    done = 0
    guided = model.guided_steps(plan, settings)
    last = max((t for t, on in enumerate(guided) if on), default=-1)
    for t in range(plan.n_steps):
        n = len(plan.cells_of_step[t])
        here = slice(done, done + n)
        take = partial(_take, model, buffers.broken[t], drawn[:, here], inputs.noise[:, here], settings, guided[t])
        model.draw_step(states, plan, t, take)
        done += n
        yield t
        if t + 1 == plan.n_steps:
            break
        if t == last:  # guidance does not come back
            rows, rope = batch, rope[:batch]
            cache.keep_rows(batch)
        slots = plan.slots_of_step[t]
        fed = _with_row_ends(drawn[:, done - n : done], slots.stop - slots.start)
        fed = fed.repeat(rows // batch, 1)  # (R, slots)
        step_mask = _key_mask(plan, prefix, slots, rows)
        turns = rope[:, length + slots.start : length + slots.stop]
        states = model.step(fed, turns, step_mask, cache, vertical)


def _take(
    model: GridModel,
    broken: Tensor,
    drawn: Tensor,
    noise: Tensor,
    settings: SamplingSettings,
    guided: bool,
    logits: Tensor,
    cells: slice,
) -> Tensor:
    """The codes (R, m) of some cells of a step for their logits (R, m, V); into `drawn` (B, n) by `noise` (B, n).

    broken: (), of the step, set by its first cells.
    """
    batch = len(drawn)
    mixed = guide(logits[:batch], logits[batch:], settings.scale) if guided else logits[:batch]
    bad = unusable(mixed)
    broken.copy_(bad if cells.start == 0 else bad | broken)
    codes = model.agreed(choose(mixed, noise[:, cells], settings))
    drawn[:, cells] = codes
    return codes.repeat(len(logits) // batch, 1)


def _with_row_ends(codes: Tensor, n_slots: int) -> Tensor:
    """Codes of a step (B, n) followed by its row-end token, if it has one."""
    missing = n_slots - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing), value=ROW_END) if missing else codes


def _key_mask(plan: DecodePlan, prefix: Prefix, slots: slice, rows: int) -> Tensor | None:
    """Which of the cached positions a step's slots see: None = all; else (1 or R, 1, 1 or n, filled + n) bool."""
    device = prefix.x.device
    if isinstance(plan.visible, Tensor) and slots.stop - slots.start > 1:
        image = plan.on("slot_mask", device)[None, slots, : slots.stop]  # (1, n, slots.stop)
    elif prefix.mask is None:
        return None
    else:
        image = torch.ones(1, 1, slots.stop, dtype=torch.bool, device=device)
    keys = image.new_ones(1, 1, len(prefix)) if prefix.mask is None else prefix.mask[:rows, None]
    keys, image = keys.expand(-1, image.shape[1], -1), image.expand(len(keys), -1, -1)
    return torch.cat([keys, image], dim=-1)[:, None]
