"""Runner fused, by Triton's interpreter: codes of the eager loop, steps that share one graph, launches counted."""

from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("triton")

from flashar_pl.decoding import Engine, fused, generate
from flashar_pl.decoding.fused import Fused, FusedRecording, decode_fused, refusal
from flashar_pl.decoding.loop import Buffers, Inputs, decode
from flashar_pl.decoding.prepare import prepare
from flashar_pl.layers.kernels.launch import watched
from flashar_pl.models import FlashAR
from flashar_pl.models.base import GridModel
from flashar_pl.numerics import uniforms
from flashar_pl.options import SamplingSettings

PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]
NULLS = [torch.tensor([1, 2, 3, 4, 9])] * 2


def case(name: str) -> tuple[GridModel, Any, dict[str, Any]]:
    """A model in float64, conditions of two samples, and what else decoding them takes."""
    if name == "emu":
        return tiny.emu_flashar().double(), PROMPTS, {"unconditional": NULLS, "cfg_scale": 2.0}
    if name == "text":
        return (
            tiny.flashar(condition="text", m=0).double(),
            tiny.captions([2, 5]),
            {"cfg_scale": 1.5, "cfg_interval": 1},
        )
    if name == "average":
        made = tiny.flashar(m=2, fusion="average", corner="fused").double()
        return made, tiny.classes(2), {"cfg_scale": 1.0, "greedy": True}
    model = tiny.flashar(n_head=4, n_kv_head=2).double()
    return model, tiny.classes(2), {"cfg_scale": 2.0, "top_k": 12, "top_p": 0.9, "temperature": 0.9}


@pytest.mark.parametrize(("name", "plan", "grid"), [
    ("class", "diagonal", (2, 1)),
    *(pytest.param(name, plan, grid, marks=pytest.mark.slow) for name, plan, grid in [
        ("class", "diagonal", (2, 3)), ("class", "raster", (1, 3)), ("emu", "diagonal", (3, 2)),
        ("emu", "raster", (2, 2)), ("text", "diagonal", (2, 2)), ("average", "diagonal", (2, 2)),
    ]),
])  # fmt: skip
def test_codes_are_those_of_the_eager_loop(name: str, plan: str, grid: tuple[int, int]) -> None:
    """Guidance and its end, filters, prompts of unequal length, row ends, both kinds of fusion."""
    model, condition, asked = case(name)
    want = generate(model, condition, grid, plan, seeds=3, **asked)
    engine = Engine(model, "fused")
    with watched() as launches:
        assert torch.equal(engine.generate(condition, grid, plan, seeds=3, **asked), want)
    assert "attend" in {each.name for each in launches}


def inputs_of(model: GridModel, condition: Any, plan: Any, settings: SamplingSettings, seed: int = 0) -> Inputs:
    backbone = model.backbone
    given = backbone.with_unconditional(condition, NULLS if isinstance(condition, list) else None)
    prefix = model.prefix(given)
    rope = model.rope(plan, prefix, settings.guided)
    return Inputs(prefix, rope, uniforms([seed, seed + 1][: len(condition)], plan.n_cells).to(rope.device))


class Again:
    """A CUDA graph as far as this matters: what it did once, it does again."""

    def __init__(self, run: Any, *_: Any) -> None:
        self.replay = run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan", "grid"), [("class", "raster", (1, 4)), ("text", "diagonal", (2, 4))])
@torch.no_grad()
def test_one_graph_serves_all_steps_of_its_kind(
    name: str, plan: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in place of another of its kind, and another batch: only the device's memory may tell them apart."""

    @contextmanager
    def warmed(device: Any, run: Any) -> Any:
        yield None

    monkeypatch.setattr(fused, "captured", Again)
    monkeypatch.setattr(fused, "warmed", warmed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(fused, "MIN_KEYS", 2)  # attention in several parts
    model, condition, _ = case(name)
    order, settings = model.make_plan(plan, *grid), SamplingSettings(cfg_scale=2.0)
    first, second = (inputs_of(model, condition, order, settings, seed) for seed in (0, 1))
    recording = FusedRecording(model, order, settings, first)
    assert recording.fused.split.parts > 1
    assert len(recording.graphs) < order.n_steps
    steps: list[int] = []
    got = recording.replay(second, lambda progress: steps.append(progress.steps)).drawn
    buffers = Buffers.allocate(model, order, second)
    for _ in decode(model, order, settings, second, buffers):
        pass
    assert torch.equal(got, buffers.drawn)
    assert steps == list(range(1, order.n_steps + 1))


def launches_of(plan: str) -> tuple[Fused, list[str]]:
    """Of a guided decoding of one 6 x 6 image with 2 layers and a branch of 1, on the meta device."""
    model = tiny.flashar().to("meta")
    with torch.device("meta"), torch.no_grad():
        order, settings = model.make_plan(plan, 6, 6), SamplingSettings(cfg_scale=2.0)
        inputs = inputs_of(model, torch.zeros(1, dtype=torch.int64), order, settings)
        buffers = Buffers.allocate(model, order, inputs)
        with watched() as found:
            for _ in decode_fused(model, order, settings, inputs, buffers):
                pass
        return Fused(model, order, settings, inputs, buffers), [each.name for each in found]


def test_five_kernels_a_layer_and_three_a_step() -> None:
    """The budget; and graphs: one a width of a diagonal and direction, few for a raster."""
    of, names = launches_of("diagonal")
    assert len(names) == 10 * 3 * 5 + 11 + 10 + 9  # layers; draws; heads; of step 1 no cell has both heads
    assert len({of.kind(t) for t in range(11)}) == 11
    of, names = launches_of("raster")
    assert len(names) == 35 * 2 * 5 + 36 + 35
    assert len({of.kind(t) for t in range(36)}) == 3


@pytest.mark.parametrize(("why", "make"), [
    ("packed", lambda: prepare(tiny.flashar(dim=32), "packed")),
    ("the parameters have several dtypes", lambda: _mixed(tiny.flashar())),
    ("the model draws the codes of a diagonal in groups", lambda: FlashAR(tiny.backbone(), 1, intra={"groups": 2})),
])  # fmt: skip
def test_what_the_kernels_cannot_do_is_said(why: str, make: Any) -> None:
    with pytest.raises(ValueError, match=rf"runner is fused, and .*{why}.*use eager"):
        Engine(make(), "fused")


def _mixed(model: FlashAR) -> FlashAR:
    model.backbone.norm.double()
    return model


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter, on a CPU."""
    assert refusal(tiny.flashar()) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"the kernels need a CUDA device; use eager"):
        Engine(tiny.flashar(), "fused")


@pytest.mark.parametrize("plan", ["lossless", "limited"])
def test_other_plans_are_refused(plan: str) -> None:
    """Their steps, or what their slots see, are not those of the kernels."""
    with pytest.raises(ValueError, match=f"its kernels know no {plan} plan"):
        Engine(tiny.flashar(), "fused").generate(tiny.classes(1), (3, 3), plan)
