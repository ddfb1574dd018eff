"""Lossless decoding: the codes of the raster plan, code for code, in fewer forwards."""

from typing import Any

import pytest
import tiny
import torch
from pretend_gpu import PretendGPU

from flashar_pl.backbones import Condition
from flashar_pl.decoding import Engine, generate
from flashar_pl.models import RasterAR
from flashar_pl.models.base import GridModel
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.options import EngineOptions

PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9]), torch.tensor([4, 9])]
NULLS = {"unconditional": [torch.tensor([1, 2, 3, 4, 9])] * 3}
SETTINGS = (
    {},
    {"greedy": True},
    {"cfg_scale": 2.0, "top_k": 7, "temperature": 0.7},
    {"cfg_scale": 3.0, "cfg_interval": 4, "top_p": 0.8},
)


def make(kind: str) -> tuple[GridModel, Condition, dict[str, Any]]:
    """A model in float64, conditions of three samples, and what guidance needs besides."""
    if kind == "emu":
        return tiny.emu_flashar().double(), PROMPTS, NULLS
    if kind == "released":
        released = ReleasedFlashAR(tiny.emu(), 2, 1)
        tiny.randomise(released.vertical, 1)
        return released.double().eval(), PROMPTS, NULLS
    if kind == "text":
        return tiny.flashar(condition="text").double(), tiny.captions([2, 5, 3]), {}
    return tiny.flashar(n_head=4, n_kv_head=2).double(), tiny.classes(3), {}


@pytest.mark.parametrize(
    ("kind", "drafter"),
    [
        ("class", "above"),
        pytest.param("class", "vertical", marks=pytest.mark.slow),
        ("text", "vertical"),
        ("emu", "vertical"),
        pytest.param("emu", "above", marks=pytest.mark.slow),
        pytest.param("released", "vertical", marks=pytest.mark.slow),
    ],
)
def test_every_code_is_the_raster_sampler_s(kind: str, drafter: Any) -> None:
    """Guards acceptance, the overwritten cache, row ends, padding of prompts and guidance by position.

    One code accepted too early, or one key of a wrong guess left in the cache, changes what follows it.
    """
    model, condition, nulls = make(kind)
    for rows, settings in enumerate(SETTINGS, 1):
        guidance = nulls if "cfg_scale" in settings else {}
        engine = Engine(model, "eager", drafter, rows)
        for seed in (0, 50)[: 1 + rows % 2]:  # the second batch meets the buffers of the first
            asked: dict[str, Any] = {"seeds": seed, **guidance, **settings}
            expected = generate(model, condition, (3, 4), "raster", **asked)
            assert torch.equal(engine.generate(condition, (3, 4), "lossless", **asked), expected)
        assert all(2 <= n <= 12 for n in engine.forwards), "the prefix, then at least one code per forward"
        assert len(engine.forwards) == 3 + 3 * (rows % 2)


def test_a_predictable_image_takes_few_forwards() -> None:
    """Guards acceptance against accepting one code only, which would be lossless and no faster than raster decoding."""
    model = RasterAR(tiny.backbone()).double()
    model.backbone.head.weight.data.zero_()  # all codes alike: greedy takes code 0
    engine, steps = Engine(model, "eager"), list[int]()
    engine.generate(tiny.classes(2), (4, 4), "lossless", greedy=True, on_step=lambda p: steps.append(p.steps))
    assert engine.forwards == [3, 3], "16 cells: the prefix, and twice a window of eight"
    assert steps == list(range(1, 17))


@pytest.mark.parametrize("kind", ["class", "emu"])
def test_the_recorded_step_serves_other_batches(kind: str) -> None:
    """Guards the step against control flow or shapes that depend on values, and against a wait for the device."""
    model, condition, nulls = make(kind)
    asked: dict[str, Any] = {"cfg_scale": 2.0, "top_k": 9, **nulls}
    with PretendGPU():
        model.to("cuda")
        fast = Engine(model, "graphs", "vertical")
        for seed in (0, 9):
            codes = fast.generate(condition, (2, 3), "lossless", seeds=seed, **asked)
            expected = generate(model, condition, (2, 3), "raster", seeds=seed, **asked)
            assert torch.equal(codes.cpu(), expected.cpu())
        (kept,) = fast._kept.values()
        assert kept._graph is not None  # type: ignore[union-attr]


def test_what_cannot_be_drafted_is_refused() -> None:
    """Guards against an option that is silently ignored."""
    raster = Engine(RasterAR(tiny.backbone()), "eager", "vertical")
    with pytest.raises(ValueError, match="no vertical branch; expected above"):
        raster.generate(tiny.classes(1), (2, 2), "lossless")
    with pytest.raises(ValueError, match="for --plan lossless"):
        EngineOptions(window_rows=3).speculation("diagonal")
    with pytest.raises(ValueError, match="window_rows is 0"):
        EngineOptions(window_rows=0)
