"""Raster decoding as plainly as published baselines do it, to compare with; nothing else uses it.

One forward per row of guidance instead of one for both, a cache that grows by concatenation, one layer after the
other in eager mode. Same model, same random numbers, same codes up to rounding as `generate(plan="raster")`.

Shapes: B samples, P prefix, n slots of a step, K cached positions, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.backbones.condition import Condition, Given, as_condition
from flashar_pl.grid import ROW_END, DecodePlan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.transformer import decode_mode
from flashar_pl.models.base import GridModel
from flashar_pl.numerics import sample_seeds, uniforms
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import choose, guide


class GrowingCache(KVCache):
    """Keys and values of each layer, made anew by concatenation whenever positions are added."""

    def __init__(self, spec: CacheSpec) -> None:
        self.parts: list[tuple[Tensor, Tensor] | None] = [None] * spec.n_layer
        self.filled = 0
        self.n_prefix = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate (B, G, n, E) to `layer`; all keys and values (B, G, K, E)."""
        old = self.parts[layer]
        new = (keys, values) if old is None else (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
        self.parts[layer] = new
        return new


class _Pass:
    """One pass over the samples, conditional or unconditional."""

    def __init__(self, model: GridModel, condition: Condition, plan: DecodePlan) -> None:
        self.model, self.plan, self.prefix = model, plan, model.backbone.prefix(condition)
        self.rope, self.cache = model.rope(plan, self.prefix), GrowingCache(model.cache_spec())
        mask = model.backbone.sequence_mask(plan, self.prefix, 0)
        self.states = model.prefill(self.prefix.x, self.rope[:, : len(self.prefix)], mask, self.cache, vertical=False)

    def feed(self, codes: Tensor, slots: slice) -> None:
        """Codes (B, n), row ends included."""
        begin, end = len(self.prefix) + slots.start, len(self.prefix) + slots.stop
        mask = self.model.backbone.sequence_mask(self.plan, self.prefix, slots.stop)[:, :, begin:end]
        self.states = self.model.step(codes, self.rope[:, begin:end], mask, self.cache, vertical=False)


@torch.no_grad()
def generate_plain(
    model: GridModel,
    condition: Given,
    grid: tuple[int, int],
    settings: SamplingSettings,
    seeds: int | list[int] | Tensor | None = None,
    unconditional: Given | None = None,
) -> Tensor:
    """Codes (B, H, W) int64 in raster order. Arguments as in `generate`; every step is guided."""
    assert settings.cfg_interval is None, "the plain baseline guides every step"
    plan, conditions = model.make_plan("raster", *grid), [model.backbone.check_condition(condition).to(model.device)]
    batch = len(conditions[0])
    noise = uniforms(sample_seeds(seeds, batch), plan.n_cells).to(model.device)  # (B, N)
    if settings.guided:
        nulls = None if unconditional is None else as_condition(unconditional).to(model.device)
        conditions.append(model.backbone.with_unconditional(conditions[0], nulls).rows(slice(batch, None)))
    with decode_mode(model):
        passes = [_Pass(model, part, plan) for part in conditions]
        drawn = []
        for t, slots in enumerate(plan.slots_of_step):
            logits = [model.step_logits(each.states, plan, t) for each in passes]  # (B, 1, V)
            mixed = guide(logits[0], logits[1], settings.scale) if settings.guided else logits[0]
            drawn.append(choose(mixed, noise[:, t : t + 1], settings))  # (B, 1)
            if t + 1 < plan.n_steps:
                fed = torch.nn.functional.pad(drawn[-1], (0, slots.stop - slots.start - 1), value=ROW_END)
                for each in passes:
                    each.feed(fed, slots)
    return torch.cat(drawn, dim=1).view(batch, *grid)
