"""The decoding loop: one for every plan, model and guidance setting, over a static KV cache in plan order.

Step t draws all its cells at once from the states of step t - 1, then feeds them (Sec. 4.4). The last step is never
fed. With guidance the unconditional rows stand below the conditional ones in the same batch.

Shapes: B samples, R rows (B, or 2B with guidance), P prefix, K = P + S positions, N cells, n cells of a step, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flashar_pl.backbones.base import Backbone, Condition, Prefix, move_condition
from flashar_pl.grid import ROW_END, DecodePlan, check_grid
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.models.base import GridModel
from flashar_pl.models.raster import RasterAR
from flashar_pl.numerics import full_precision, sample_seeds, uniforms
from flashar_pl.sampling import SamplingSettings, choose, guide


def generate(
    model: GridModel | Backbone,
    condition: Condition,
    grid: tuple[int, int],
    plan: str = "diagonal",
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seeds: int | list[int] | Tensor | None = None,
    unconditional: Condition | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Sample codes (B, H, W) int64 for the B samples of `condition`.

    Args:
        model: a FlashAR or RasterAR model, or a bare backbone (raster plan only).
        condition: class ids (B,) int64, TextFeatures, or a list of id tensors, as the backbone expects.
        grid: (H, W).
        plan: "diagonal" (H + W - 1 steps) or "raster" (H * W steps, horizontal head only).
        cfg_scale: s in u + s (c - u), applied to the fused logits; 1 = one pass without guidance.
        cfg_interval: k: a step is guided if at most k + 1 cells were decoded before it; None = always.
        temperature, top_k, top_p, greedy: see `SamplingSettings`.
        seeds: None = random, an int s = sample i uses s + i, or B ints. Equal seed and batch shape give equal codes.
        unconditional: None = the model's own null condition.
        on_step: called after every step, for a progress bar. The device may be some steps behind.

    Raises:
        ValueError: a setting out of range, a condition of the wrong kind, or a plan the model cannot run.
    """
    settings = SamplingSettings(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy)
    wrapped = RasterAR(model) if isinstance(model, Backbone) else model
    height, width = check_grid(grid)
    order = wrapped.make_plan(plan, height, width)
    backbone = wrapped.backbone
    backbone.check_condition(condition)
    listed = sample_seeds(seeds, len(condition))
    if not listed:
        raise ValueError("condition holds no samples; expected at least one.")
    device = wrapped.device
    condition = move_condition(condition, device)
    if unconditional is not None:
        backbone.check_condition(unconditional, len(listed))
        unconditional = move_condition(unconditional, device)
    noise = uniforms(listed, order.n_cells)[:, order.order].to(device)  # (B, N) in plan order
    with torch.no_grad(), evaluating(wrapped), full_precision(device.type):
        if settings.guided:
            condition = backbone.with_unconditional(condition, unconditional)
        drawn = decode(wrapped, wrapped.prefix(condition), order, settings, noise, on_step)  # (B, N)
    codes = torch.empty_like(drawn)
    codes[:, order.on("order", device)] = drawn
    return codes.view(-1, height, width)


def decode(
    model: GridModel,
    prefix: Prefix,
    plan: DecodePlan,
    settings: SamplingSettings,
    noise: Tensor,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Codes (B, N) int64 in plan order for an embedded prefix of B or, with guidance, 2B rows.

    noise: (B, N) float64 uniforms in plan order. on_step: called after every step.
    """
    batch, rows, length = noise.shape[0], prefix.x.shape[0], len(prefix)
    rope = model.rope(plan, prefix, settings.guided)
    cache = KVCache(model.cache_spec(), rows, length + plan.n_inputs, prefix.x.dtype, prefix.x.device)
    drawn = torch.empty(noise.shape, dtype=torch.int64, device=noise.device)  # (B, N)
    vertical = plan.has_vertical
    mask = model.backbone.sequence_mask(plan, prefix, 0)
    states = model.prefill(prefix.x, _positions(rope, 0, length), mask, cache, vertical)
    done = 0
    for t in range(plan.n_steps):
        n = len(plan.cells_of_step[t])
        guided = settings.guides(done)
        logits = model.step_logits(states, plan, t)  # (R, n, V)
        if guided:
            logits = guide(logits[:batch], logits[batch:], settings.cfg_scale)
        drawn[:, done : done + n] = choose(logits, noise[:, done : done + n], settings)
        done += n
        if on_step is not None:
            on_step()
        if t + 1 == plan.n_steps:
            break
        if guided and not settings.guides(done):  # guidance never comes back
            rows, rope = batch, _rope_rows(rope, batch)
            cache.keep_rows(batch)
        slots = plan.slots_of_step[t]
        fed = _with_row_ends(drawn[:, done - n : done], slots.stop - slots.start)
        fed = fed.repeat(rows // batch, 1)  # (R, slots)
        step_mask = _key_mask(plan, prefix, slots, rows)
        positions = _positions(rope, length + slots.start, length + slots.stop)
        states = model.step(fed, positions, step_mask, cache, vertical)
    return drawn


def _positions(rope: Rope, begin: int, end: int) -> Rope:
    return rope[0][:, begin:end], rope[1][:, begin:end]


def _rope_rows(rope: Rope, rows: int) -> Rope:
    return rope[0][:rows], rope[1][:rows]


def _with_row_ends(codes: Tensor, n_slots: int) -> Tensor:
    """Codes of a step (B, n) followed by its row-end token, if it has one."""
    missing = n_slots - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing), value=ROW_END) if missing else codes


def _key_mask(plan: DecodePlan, prefix: Prefix, slots: slice, rows: int) -> Tensor | None:
    """Which of the cached positions a step's slots see: None = all; else (1 or R, 1, 1 or n, filled + n) bool."""
    device = prefix.x.device
    image = None
    if isinstance(plan.visible, Tensor) and slots.stop - slots.start > 1:
        image = plan.on("slot_mask", device)[slots, : slots.stop]  # (n, slots.stop)
    if prefix.mask is None and image is None:
        return None
    keys = prefix.mask[:rows, None] if prefix.mask is not None else image.new_ones(1, 1, len(prefix))  # type: ignore[union-attr]
    n = 1 if image is None else image.shape[0]
    seen = torch.ones(1, n, slots.stop, dtype=torch.bool, device=device) if image is None else image[None]
    keys, seen = keys.expand(-1, n, -1), seen.expand(keys.shape[0], -1, -1)
    return torch.cat([keys, seen], dim=-1)[:, None]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
