"""Whether decoded codes are what the model says: a comparison with the whole model, computed anew without a cache.

Shapes: B samples, H, W grid, N cells, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.backbones.condition import Given, as_condition
from flashar_pl.layers.transformer import decode_mode
from flashar_pl.models.base import GridModel
from flashar_pl.numerics import sample_seeds, uniforms
from flashar_pl.sampling import guide, probabilities


@torch.no_grad()
def misplacement(
    model: GridModel,
    codes: Tensor,
    condition: Given,
    plan: str,
    cfg_scale: float = 1.0,
    seeds: int | list[int] | Tensor = 0,
    unconditional: Given | None = None,
) -> Tensor:
    """(B, H, W) float64: how far each cell's uniform lies outside the interval that its code has in the CDF.

    Codes that `generate` drew with these `seeds` and arguments, and no filter, have 0 up to rounding if cache, masks,
    positions, guidance, order of cells and drawing are right: the CDF is that of one teacher-forced pass over the
    finished codes (B, H, W). Its logits are all in memory, three times B H W V float32, twice with guidance.

    Raises:
        ValueError: codes, condition or plan that the model cannot use.
    """
    codes = codes.to(model.device)
    order = model.make_plan(plan, codes.shape[1], codes.shape[2])
    condition = as_condition(condition).to(model.device)
    if unconditional is not None:
        unconditional = as_condition(unconditional).to(model.device)
    with decode_mode(model):  # as `generate`: no dropout, whatever mode the model is in
        if cfg_scale == 1:
            logits = model(codes, condition, order).fused  # (B, H, W, V)
        else:
            both = model.backbone.with_unconditional(condition, unconditional)
            fused = model(codes.repeat(2, 1, 1), both, order).fused
            logits = guide(fused[: len(codes)], fused[len(codes) :], cfg_scale)
    cdf = probabilities(logits).double().cumsum(-1)
    ends = cdf.gather(-1, codes[..., None]).squeeze(-1)
    begins = torch.where(codes > 0, cdf.gather(-1, (codes - 1).clamp_min(0)[..., None]).squeeze(-1), 0.0)
    drawn = uniforms(sample_seeds(seeds, len(codes)), order.n_cells).to(codes.device).view_as(ends) * cdf[..., -1]
    return torch.maximum(begins - drawn, drawn - ends).clamp_min(0)
