"""PAR (Wang et al., "Parallelized Autoregressive Visual Generation", 2024): one cell of every region per step.

The grid is cut into M x M regions. Their first cells are decoded one by one; then every step decodes the next cell of
each region at once. `plans.region_plan` has order and mask. What a LlamaGen model lacks is n - 1 learnable tokens: they
stand beside the last of the first cells in the step that turns from one prediction per call to n = M * M.

Shapes: B samples, R rows, H, W grid, N cells, V codes, D width, n tokens of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, initialise
from flashar_pl.backbones.condition import Given, Prefix
from flashar_pl.grid import DecodePlan, check_grid
from flashar_pl.layers.rope import Rope
from flashar_pl.models.baselines.plans import check_regions, region_plan
from flashar_pl.models.raster import RasterAR
from flashar_pl.options import SamplingSettings


class PAR(RasterAR):
    """A PAR model on a backbone.

    It is a raster model with an order of its own and learnable tokens: loss, likelihood and cached decoding are those
    of every `GridModel`.

    Args:
        backbone: with a prefix of one class token, as published.
        tokens_per_step: n = M * M, 4 or 16 in the published models.
        grid: (H, W) that `generate` draws where it is given none; None = the backbone's usual one.

    Raises:
        ValueError: `tokens_per_step` is no square of 2 or more, or the backbone has row ends.
    """

    method = "PAR"
    plan_name = "regions"
    plans = ("regions",)

    def __init__(self, backbone: Backbone, tokens_per_step: int = 4, grid: tuple[int, int] | None = None) -> None:
        check_regions(tokens_per_step)
        if backbone.row_ends:
            raise ValueError(
                f"{backbone.kind} has row-end tokens, which regions leave no place for; expected a backbone without."
            )
        super().__init__(backbone)
        self.tokens_per_step = tokens_per_step
        self.usual_grid = backbone.usual_grid if grid is None else check_grid(grid)
        self.learnable = nn.Embedding(tokens_per_step - 1, backbone.dim)
        initialise(self.learnable)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> PAR:
        """A model from official weights.

        config: dim, n_layer, n_head, vocab_size, num_classes and ar_token_num (n), and where they differ from
        LlamaGen's n_kv_head, multiple_of, ffn_dim_multiplier, rope_base, norm_eps, block_size (N of a square grid).

        Raises:
            ValueError: another method's weights, missing or unknown keys, or sizes that differ from the configuration.
        """
        return resolve_name("flashar_pl.checkpoints.baselines:read_par")(state_dict, config)

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, bit-exact inverse of `from_official`."""
        return resolve_name("flashar_pl.checkpoints.baselines:write_par")(self)

    def config(self) -> dict[str, Any]:
        return {"kind": "par", "backbone": self.backbone.config_dict(), "tokens_per_step": self.tokens_per_step}

    def make_plan(self, name: str | None, height: int, width: int) -> DecodePlan:
        if name not in (None, self.plan_name):
            raise ValueError(f"plan is {name!r}, and a PAR model knows its own only; leave it out, or regions.")
        return region_plan(height, width, self.tokens_per_step)

    def check_plan(self, plan: DecodePlan) -> None:
        if (plan.name, plan.n_slots - plan.n_cells) != (self.plan_name, self.tokens_per_step - 1):
            raise ValueError(f"the plan is {plan!r}; expected region_plan(H, W, {self.tokens_per_step}).")

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (R, n) int64; the k-th -1 of a row is the k-th learnable token -> (R, n, D)."""
        missing = codes < 0
        learnt = self.learnable((missing.cumsum(1) - 1).clamp_min(0))  # (R, n, D)
        return torch.where(missing[..., None], learnt, self.backbone.embed(codes.clamp_min(0)))

    def rope(self, plan: DecodePlan, prefix: Prefix, guided: bool = False) -> Rope:
        """Of cells, their places in the grid; zero for learnable tokens, as for the class token."""
        rope = self.backbone.rope(plan, prefix)
        held = torch.nn.functional.pad(plan.on("cell", rope.device) >= 0, (len(prefix), 0), value=True)
        return rope * held[None, :, None, None]

    def guided_steps(self, plan: DecodePlan, settings: SamplingSettings) -> list[bool]:
        """As the authors count: one per call while cells come one by one, then n per call, again from 0."""
        n = self.tokens_per_step
        return [settings.guides(done if done < n else done - n + 1) for done in plan.cells_before]

    def logits(self, codes: Tensor, classes: Given) -> Tensor:
        """Teacher-forced logits (B, H, W, V) float32 of codes (B, H, W) int64: [p, q] predicts codes[p, q]."""
        return self(codes, classes).fused

    def generate(self, classes: Given, *, grid: tuple[int, int] | None = None, **options: Any) -> Tensor:
        """Codes (B, H, W) int64, in n + (N - n) / n calls of the model.

        Args:
            classes: (B,) int64.
            grid: (H, W), multiples of M; None = that of the configuration.
            options: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seeds, unconditional, on_step of
                `flashar_pl.decoding.generate`. `cfg_interval` k: see `guided_steps`.
        """
        draw = resolve_name("flashar_pl.decoding:generate")
        return draw(self, classes, grid=grid or self.usual_grid, plan=self.plan_name, **options)
