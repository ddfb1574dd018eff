"""Decoding orders of the baselines as plans, and the mask of block diffusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashar_pl.grid import NONE, ROW_END, DecodePlan, check_grid, plan_builder


@plan_builder
def region_plan(height: int, width: int, tokens: int) -> DecodePlan:
    """PAR's order (Wang et al., 2024): `tokens` = M * M regions, after their first cells one cell of each per step.

    A region has (H / M) x (W / M) cells. Cells are sorted by their place inside a region, then by region, both in
    raster order. The first M * M are decoded one by one, so there are M * M + (N - M * M) / (M * M) steps. A slot
    predicts the next one; to the last of the first cells M * M - 1 learnable tokens are joined, so that from there on
    a slot predicts the next cell of its own region.

    Raises:
        ValueError: `tokens` is no square of 2 or more, or M does not divide H and W.
    """
    check_grid((height, width))
    side = check_regions(tokens)
    if height % side or width % side:
        raise ValueError(
            f"grid is {height} x {width}, and {tokens} tokens per step are {side} x {side} regions; expected a grid "
            f"whose height and width are multiples of {side}."
        )
    n = height * width
    regions = torch.arange(n).view(side, height // side, side, width // side)  # (a, u, b, v)
    order = regions.permute(1, 3, 0, 2).flatten()  # (u, v, a, b)
    k = torch.arange(n)
    step_of_k = torch.where(k < tokens, k, tokens - 1 + k // tokens)
    step, source = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    step[order], source[order] = step_of_k, k - 1  # slot p - 1 predicts the p-th cell; the prefix, -1, the first
    learnable = torch.full((tokens - 1,), ROW_END)
    return DecodePlan(
        name="regions",
        height=height,
        width=width,
        order=order,
        step=step,
        n_steps=tokens - 1 + n // tokens,
        cell=torch.cat([order[:tokens], learnable, order[tokens:]]),
        h_source=source,
        v_source=torch.full((n,), NONE),
        slot_step=torch.cat([step_of_k[:tokens], step_of_k[tokens - 1].expand(tokens - 1), step_of_k[tokens:]]),
    )


def check_regions(tokens: int) -> int:
    """M, the regions of a side, of M * M tokens per step. ValueError if there is no M of 2 or more."""
    if int(tokens) != tokens or tokens < 4 or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{tokens} tokens per step are no square of regions; expected 4, 9, 16 and so on.")
    return math.isqrt(tokens)


SQUARES = {"sub4x4": 4, "sub8x8": 8}
"""Height and width of a block."""
BLOCKS = ("mdlm", "row", *SQUARES)
"""Names that `block_plan` knows."""


@plan_builder
def block_plan(height: int, width: int, strategy: str) -> DecodePlan:
    """Block diffusion: one block of cells per step, each cell predicted at its own slot, which holds a mask token.

    strategy: "mdlm", the whole grid is one block; "row", every row; "sub4x4" and "sub8x8", squares in raster order. A
    cell sees its own block and those before.

    Raises:
        ValueError: another strategy, or a grid that squares do not tile.
    """
    check_grid((height, width))
    n, side = height * width, SQUARES.get(strategy, 1)
    if strategy not in BLOCKS:
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(BLOCKS)}.")
    if height % side or width % side:
        raise ValueError(
            f"grid is {height} x {width}; {strategy} expects a height and a width that are multiples of {side}."
        )
    p, q = torch.arange(n) // width, torch.arange(n) % width
    squares = p // side * (width // side) + q // side
    block = {"mdlm": torch.zeros_like(p), "row": p}.get(strategy, squares)
    order = torch.argsort(block, stable=True)
    slot = torch.empty(n, dtype=torch.int64)
    slot[order] = torch.arange(n)
    return DecodePlan(
        name="blocks",
        height=height,
        width=width,
        order=order,
        step=block,
        n_steps=int(block[-1]) + 1,
        cell=order,
        h_source=slot,
        v_source=torch.full((n,), NONE),
        slot_step=block[order],
    )


@plan_builder
def scale_plan(patch_nums: tuple[int, ...]) -> DecodePlan:
    """VAR's order (Tian et al., 2024): scale after scale, of p * p codes each, in one row of all of them.

    Each code is predicted at its own slot, which holds the image so far. A slot sees its own scale and smaller ones.
    """
    scale = torch.cat([torch.full((side * side,), k) for k, side in enumerate(patch_nums)])
    n = len(scale)
    cells = torch.arange(n)
    return DecodePlan(
        name="scales",
        height=1,
        width=n,
        order=cells,
        step=scale,
        n_steps=len(patch_nums),
        cell=cells,
        h_source=cells,
        v_source=torch.full((n,), NONE),
        slot_step=scale,
    )


def doubled_mask(plan: DecodePlan, prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """(P + 2S, P + 2S) bool for [prefix | slots | slots again, clean] (BD3-LM, Arriola et al., 2025).

    A slot sees the slots of its own step and, in the clean copy, those of earlier steps; a clean slot sees the clean
    ones up to its own step.
    """
    n, step = plan.n_slots, plan.on("slot_step", device)
    mask = torch.zeros(prefix + 2 * n, prefix + 2 * n, dtype=torch.bool, device=device)
    mask[:prefix, :prefix] = torch.ones_like(mask[:prefix, :prefix]).tril()
    mask[prefix:, :prefix] = True
    mask[prefix : prefix + n, prefix : prefix + n] = step[:, None] == step
    mask[prefix : prefix + n, prefix + n :] = step[:, None] > step
    mask[prefix + n :, prefix + n :] = step[:, None] >= step
    return mask
