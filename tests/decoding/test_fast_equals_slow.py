"""The cached, batched loop against a loop that recomputes everything at every step.

The slow loop knows nothing of plans, caches, slots or joint guidance batches: at each step it runs the whole model on
the codes so far (zeros where nothing is decoded yet, which no prediction may see), conditionally and unconditionally,
guides, and draws each cell by scanning its CDF.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from flashar_pl.backbones import Condition, TextFeatures
from flashar_pl.decoding import generate, loop
from flashar_pl.models import RasterAR
from flashar_pl.models.base import GridModel

GRIDS = [(4, 4), (3, 5), (1, 6), (5, 2)]
LENGTHS = [2, 5, 3]
MARGIN = 1e-9
"""Least relative distance of a uniform from a CDF edge, and least gap of two top logits, for codes to be comparable."""


def steps_of(plan: str, height: int, width: int) -> list[list[tuple[int, int]]]:
    cells = [(p, q) for p in range(height) for q in range(width)]
    if plan == "raster":
        return [[cell] for cell in cells]
    return [[(p, q) for p, q in cells if p + q == t] for t in range(height + width - 1)]


def condition_of(kind: str, batch: int) -> Condition:
    return tiny.classes(batch) if kind == "class" else tiny.captions(LENGTHS[:batch])


def null_of(model: GridModel, condition: Condition) -> Condition:
    if isinstance(condition, TextFeatures):
        null = model.backbone.state_dict()["condition_embedding.null"][: condition.features.shape[1]]
        return TextFeatures(torch.stack([null] * len(condition)), condition.mask)
    return torch.full_like(condition, tiny.CLASSES)  # type: ignore[arg-type]


def scan(logits: Tensor, u: float, temperature: float) -> int:
    """The first code whose cumulated probability passes u."""
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    assert (cdf - u).abs().min() > MARGIN, "this seed is too close to an edge to compare; take another one"
    return int((cdf > u).nonzero()[0])


@torch.no_grad()
def slow_generate(
    model: GridModel, condition: Condition, grid: tuple[int, int], plan: str, scale: float, interval: int | None,
    greedy: bool, seeds: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (B, H, W) and the guided logits (B, H, W, V) they were taken from."""
    height, width = grid
    codes = torch.zeros(len(seeds), height, width, dtype=torch.int64)
    used = torch.zeros(len(seeds), height, width, tiny.VOCABULARY, dtype=torch.float64)
    noise = [torch.rand(height * width, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    decoded = 0
    for cells in steps_of(plan, height, width):
        logits = model(codes, condition, model.make_plan(plan, height, width)).fused
        if scale != 1 and (interval is None or decoded <= interval + 1):
            unconditional = model(codes, null_of(model, condition), model.make_plan(plan, height, width)).fused
            logits = unconditional + scale * (logits - unconditional)
        for p, q in cells:
            used[:, p, q] = logits[:, p, q]
            for b in range(len(seeds)):
                if greedy:
                    best = logits[b, p, q].topk(2).values
                    assert best[0] - best[1] > MARGIN
                    codes[b, p, q] = logits[b, p, q].argmax()
                else:
                    codes[b, p, q] = scan(logits[b, p, q], float(noise[b][p * width + q]), 0.9)
        decoded += len(cells)
    return codes, used


def fast_generate(
    monkeypatch: pytest.MonkeyPatch, model: GridModel, condition: Condition, grid: tuple[int, int], plan: str,
    **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes of `generate` and the logits it chose from, by cell."""
    parts: list[Tensor] = []
    original = loop.choose

    def record(logits: Tensor, *rest: Any) -> Tensor:
        parts.append(logits)
        return original(logits, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "choose", record)
        codes = generate(model, condition, grid, plan, temperature=0.9, **settings)
    used = torch.cat(parts, 1)
    order = model.make_plan(plan, *grid).order
    return codes, torch.empty_like(used).index_copy_(1, order, used).unflatten(1, grid)


@pytest.mark.parametrize(("batch", "greedy"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("scale", "interval"), [(1.0, None), (2.0, None), (2.0, 3)])
@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("plan", ["raster", "diagonal"])
def test_generate_equals_full_recomputation(
    plan: str, kind: str, scale: float, interval: int | None, batch: int, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are equal, and the cached logits equal the recomputed ones, on every grid."""
    model = tiny.flashar(condition=kind, n_head=4, n_kv_head=2).double()
    condition, seeds = condition_of(kind, batch), list(range(20, 20 + batch))
    for grid in GRIDS:
        slow, slow_logits = slow_generate(model, condition, grid, plan, scale, interval, greedy, seeds)
        fast, fast_logits = fast_generate(
            monkeypatch,
            model,
            condition,
            grid,
            plan,
            cfg_scale=scale,
            cfg_interval=interval,
            greedy=greedy,
            seeds=seeds,
        )
        assert torch.equal(fast, slow), grid
        torch.testing.assert_close(fast_logits, slow_logits, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_raster_model_equals_full_recomputation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RasterAR(tiny.backbone(condition=kind)).double()
    condition = condition_of(kind, 3)
    for grid in ((3, 5), (1, 6)):
        slow, _ = slow_generate(model, condition, grid, "raster", 2.0, 3, False, [1, 2, 3])
        fast, _ = fast_generate(
            monkeypatch, model, condition, grid, "raster", cfg_scale=2.0, cfg_interval=3, seeds=[1, 2, 3]
        )
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("corner", ["horizontal", "fused"])
@pytest.mark.parametrize("fusion", ["gate", "average"])
@pytest.mark.parametrize(("m", "k"), [(0, None), (1, 1), (2, None), (2, 2)])
def test_every_branch_shape(m: int, k: int | None, fusion: str, corner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vertical branch's cache layers stand behind the backbone's; a wrong offset mixes them up."""
    model = tiny.flashar(m=m, k=k, fusion=fusion, corner=corner).double()
    condition = tiny.classes(2)
    for grid in ((3, 4), (1, 1)):
        slow, slow_logits = slow_generate(model, condition, grid, "diagonal", 1.5, None, False, [30, 31])
        fast, fast_logits = fast_generate(
            monkeypatch, model, condition, grid, "diagonal", cfg_scale=1.5, seeds=[30, 31]
        )
        assert torch.equal(fast, slow)
        torch.testing.assert_close(fast_logits, slow_logits, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_teacher_forced_logits_of_the_samples_are_those_they_were_drawn_from(
    plan: str, kind: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the finished grid scores it as decoding did: the likelihoods of `score` are those of `generate`.

    Guidance multiplies the rounding of both rows: u + s (c - u) carries (2 s - 1) times that of one.
    """
    model = tiny.flashar(condition=kind)
    for grid in [*GRIDS, (1, 1)]:
        for batch in (1, 3):
            condition = condition_of(kind, batch)
            codes, used = fast_generate(monkeypatch, model, condition, grid, plan, cfg_scale=scale, seeds=3)
            order = model.make_plan(plan, *grid)
            logits = model(codes, condition, order).fused
            if scale != 1:
                unconditional = model(codes, null_of(model, condition), order).fused
                logits = unconditional + scale * (logits - unconditional)
            torch.testing.assert_close(used, logits, atol=1e-5 * (2 * scale - 1), rtol=1e-5)
