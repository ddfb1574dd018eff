"""Decoding of `BlockDiffusion`: block after block, S calls each, without a cache or with one of finished blocks.

With the cache, the first call of a block feeds the block before it too, now clean, and keeps its keys and values: so
there are blocks * S calls, as without.

Shapes: B samples, R rows (B, or 2B with guidance), N cells, n cells of a block, S steps of a block, V codes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashar_pl.backbones.base import Backbone, hide_padding
from flashar_pl.backbones.condition import Condition
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.numerics import sample_seeds, uniforms, wide
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import check_usable, draw, filter_logits, guide, unusable

SMALLEST = 1e-10
"""Of the uniforms of Gumbel noise."""


def check_steps(steps: int) -> int:
    """S. ValueError unless it is a whole number of 1 or more."""
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more calls per block.")
    return int(steps)


@dataclass(frozen=True)
class Draws:
    """All that is random in a batch."""

    steps: int
    """S."""
    reveal: Tensor
    """(B, N) int64 by raster cell: the step of its block that reveals it. Each is equally likely."""
    codes: Tensor
    """(B, N) float64 uniforms by raster cell, for the code that is revealed."""
    gumbel: Tensor | None
    """(blocks, S, B, n, V), in their place."""

    @classmethod
    def of(
        cls,
        batch: int,
        plan: DecodePlan,
        steps: int,
        seeds: int | list[int] | Tensor | None,
        reveal_u: Tensor | None,
        gumbel_u: Tensor | None,
        vocabulary: int,
        device: torch.device,
    ) -> Draws:
        """From seeds, or from recorded uniforms, see `BlockDiffusion.generate`. ValueError for other shapes."""
        blocks, n = plan.n_steps, plan.n_cells // plan.n_steps
        for name, given, shape in (
            ("reveal_u", reveal_u, (blocks, steps - 1, batch, n)),
            ("gumbel_u", gumbel_u, (blocks, steps, batch, n, vocabulary)),
        ):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {shape}.")
        noise = uniforms(sample_seeds(seeds, batch), 2 * plan.n_cells)  # (B, 2N)
        codes, order = noise[:, : plan.n_cells], noise[:, plan.n_cells :]
        reveal = (order * steps).long()
        if reveal_u is not None:
            chance = 1 / torch.arange(steps, 1, -1, dtype=torch.float64)  # 1 / (S - s), s < S - 1
            sure = torch.ones(blocks, 1, batch, n, dtype=torch.bool)
            shown = torch.cat([reveal_u.cpu() < chance.view(-1, 1, 1), sure], dim=1)  # (blocks, S, B, n)
            first = shown.int().argmax(1)  # (blocks, B, n)
            reveal = torch.empty_like(reveal)
            reveal[:, plan.order] = first.transpose(0, 1).flatten(1)
        return cls(steps, reveal.to(device), codes.to(device), None if gumbel_u is None else gumbel_u.to(device))


class Denoiser(Protocol):
    """What is asked of a `BlockDiffusion` model, and explained there."""

    backbone: Backbone
    clean_context: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def mask_id(self) -> int: ...

    def cache_spec(self) -> CacheSpec: ...

    def embed_at(self, tokens: Tensor, t: Tensor) -> Tensor: ...

    def hidden(
        self, tokens: Tensor, condition: Condition, t: Tensor, plan: DecodePlan, clean: Tensor | None
    ) -> Tensor: ...

    def head_logits(self, h: Tensor) -> Tensor: ...


class BlockSampler:
    """One batch on its way through the blocks. condition: of R rows, the unconditional ones behind."""

    def __init__(
        self,
        model: Denoiser,
        condition: Condition,
        plan: DecodePlan,
        settings: SamplingSettings,
        draws: Draws,
        cached: bool,
    ) -> None:
        self.model, self.plan, self.settings, self.draws = model, plan, settings, draws
        backbone, device = model.backbone, model.device
        self.condition = condition
        self.tokens = torch.full((len(draws.codes), plan.n_cells), model.mask_id, device=device)  # (B, N)
        self.cells = [cells.to(device) for cells in plan.cells_of_step]
        self.copies = 2 if settings.guided else 1
        self.cache: KVCache | None = None
        if cached:
            self.prefix = backbone.prefix(self.condition)
            self.rope = backbone.rope(plan, self.prefix)
            x = self.prefix.x
            self.cache = KVCache(model.cache_spec(), len(x), x.shape[1] + plan.n_slots, x.dtype, device)

    def run(self, on_step: Callable[[Tensor], object]) -> Tensor:
        """Codes (B, N)."""
        steps, broken = self.draws.steps, []
        for block, cells in enumerate(self.cells):
            for s in range(steps):
                h = self._states(block, s) if self.cache is None else self._cached_states(self.cache, block, s)
                logits = self.model.head_logits(h)  # (R, n, V)
                if self.settings.guided:
                    batch = len(self.tokens)
                    logits = guide(logits[:batch], logits[batch:], self.settings.scale)
                broken.append(unusable(logits))
                shown = self.draws.reveal[:, cells] == s
                self.tokens[:, cells] = torch.where(shown, self._choose(logits, block, s), self.tokens[:, cells])
                on_step(self.tokens.clone())
        check_usable(torch.stack(broken), h.dtype)
        return self.tokens

    def _choose(self, logits: Tensor, block: int, s: int) -> Tensor:
        """A code (B, n) for every cell of the block from guided logits (B, n, V)."""
        if self.settings.greedy:
            return logits.argmax(-1)
        chosen = self.settings
        kept = filter_logits(logits, chosen.temperature, chosen.top_k, chosen.top_p, crossing=False)
        if self.draws.gumbel is not None:
            noise = wide(self.draws.gumbel[block, s]).clamp_min(SMALLEST)
            return (kept - (-noise.log()).log()).argmax(-1)
        return draw(kept.softmax(-1), self.draws.codes[:, self.cells[block]])

    def _states(self, block: int, s: int) -> Tensor:
        """(R, n, D) of the block's cells, from the whole sequence; all other cells have the next step's time."""
        tokens = self.tokens.repeat(self.copies, 1)
        t = torch.full((1, self.plan.n_cells), 1 - (s + 1) / self.draws.steps, device=tokens.device)
        t[:, self.cells[block]] = 1 - s / self.draws.steps
        clean = tokens if self.model.clean_context else None
        return self.model.hidden(tokens, self.condition, t, self.plan, clean)[:, self.cells[block]]

    def _cached_states(self, cache: KVCache, block: int, s: int) -> Tensor:
        """The same from the cache, to which the first call of a block adds what has become final before it."""
        model, length = self.model, len(self.prefix)
        turns = self.rope[:, length:][:, self.plan.slots_of_step[block]]
        x, kept = self._embedded(block, 1 - s / self.draws.steps), 0
        if s == 0:
            before = self.prefix.x if block == 0 else self._embedded(block - 1, 0.0)
            spots = slice(length) if block == 0 else self.plan.slots_of_step[block - 1]
            table = self.rope if block == 0 else self.rope[:, length:]
            kept = before.shape[1]
            x, turns = torch.cat([before, x], dim=1), torch.cat([table[:, spots], turns], dim=1)
        mask = torch.ones(x.shape[1], cache.filled + x.shape[1], dtype=torch.bool, device=x.device)
        mask[:kept, cache.filled + kept :] = False  # what is final does not see the block that follows
        if s == 0 and block == 0:  # a condition of several tokens is causal
            mask[:kept, :kept] = mask[:kept, :kept].tril()
        seen = None if kept == 0 and self.prefix.mask is None else hide_padding(mask, self.prefix)
        h = model.backbone.norm(model.backbone.layers(x, turns, seen, cache))
        cache.advance(kept)
        return h[:, kept:]

    def _embedded(self, block: int, t: float) -> Tensor:
        """Tokens of a block at time t, (R, n, D)."""
        tokens = self.tokens[:, self.cells[block]].repeat(self.copies, 1)
        return self.model.embed_at(tokens, torch.full((1, tokens.shape[1]), t, device=tokens.device))
