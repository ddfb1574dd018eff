"""Raster decoding as plainly as published baselines do it, to compare with; nothing else uses it.

One forward per row of guidance instead of one for both, a cache that grows by concatenation, one layer after the
other in eager mode. Same model, same random numbers, same codes up to rounding as `generate(plan="raster")`.

Shapes: B samples, P prefix, n slots of a step, K cached positions, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.backbones.condition import Given, Prefix
from flashar_pl.decoding.engine import decode_mode
from flashar_pl.grid import ROW_END, DecodePlan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.models.base import GridModel, States
from flashar_pl.numerics import sample_seeds, uniforms
from flashar_pl.sampling import SamplingSettings, choose, guide


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
    """One pass over the samples: conditional, or unconditional."""

    def __init__(self, model: GridModel, prefix: Prefix, plan: DecodePlan) -> None:
        self.model, self.prefix, self.plan = model, prefix, plan
        self.rope = model.rope(plan, prefix)
        self.cache = GrowingCache(model.cache_spec())

    def start(self) -> States:
        length = len(self.prefix)
        mask = self.model.backbone.sequence_mask(self.plan, self.prefix, 0)
        return self.model.prefill(self.prefix.x, self.rope[:, :length], mask, self.cache, vertical=False)

    def feed(self, codes: Tensor, slots: slice) -> States:
        begin, end = len(self.prefix) + slots.start, len(self.prefix) + slots.stop
        mask = self.model.backbone.sequence_mask(self.plan, self.prefix, slots.stop)[:, :, begin:end]
        return self.model.step(codes, self.rope[:, begin:end], mask, self.cache, vertical=False)


def generate_plain(
    model: GridModel,
    condition: Given,
    grid: tuple[int, int],
    settings: SamplingSettings,
    seeds: int | list[int] | Tensor | None = None,
    unconditional: Given | None = None,
) -> Tensor:
    """Codes (B, H, W) int64 in raster order. Arguments as in `generate`.

    Raises:
        ValueError: a condition of the wrong kind; cfg_interval is set, which this baseline does not know.
    """
    if settings.cfg_interval is not None:
        raise ValueError("the plain baseline guides every step; expected cfg_interval None.")
    plan = model.make_plan("raster", *grid)
    device = next(model.parameters()).device
    wanted = model.backbone.check_condition(condition).to(device)
    batch = len(wanted)
    if unconditional is not None:
        unconditional = model.backbone.check_condition(unconditional, batch).to(device)
    noise = uniforms(sample_seeds(seeds, batch), plan.n_cells).to(device)  # (B, N)
    with torch.no_grad(), decode_mode(model):
        conditions = [wanted]
        if settings.guided:
            both = model.backbone.with_unconditional(wanted, unconditional)
            conditions = [both.rows(slice(0, batch)), both.rows(slice(batch, None))]
        passes = [_Pass(model, model.backbone.prefix(part), plan) for part in conditions]
        states = [each.start() for each in passes]
        drawn = []
        for t in range(plan.n_steps):
            logits = [model.step_logits(state, plan, t) for state in states]  # (B, 1, V)
            mixed = guide(logits[0], logits[1], settings.cfg_scale) if settings.guided else logits[0]
            drawn.append(choose(mixed, noise[:, t : t + 1], settings))  # (B, 1)
            if t + 1 < plan.n_steps:
                slots = plan.slots_of_step[t]
                row_ends = slots.stop - slots.start - 1
                fed = torch.nn.functional.pad(drawn[-1], (0, row_ends), value=ROW_END)
                states = [each.feed(fed, slots) for each in passes]
    return torch.cat(drawn, dim=1).view(batch, *grid)
