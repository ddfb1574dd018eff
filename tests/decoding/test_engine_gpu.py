"""CUDA graphs on a real device: the same codes as the eager loop, recorded once, and no synchronisation."""

from typing import Any

import pytest
import tiny
import torch

from flashar_pl.backbones import Condition
from flashar_pl.decoding import Engine, generate
from flashar_pl.decoding.graphs import Recording
from flashar_pl.models.base import GridModel

pytestmark = pytest.mark.gpu
PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9]), torch.tensor([4, 9])]
NULLS = [torch.tensor([1, 2, 3, 4, 9])] * 3


def make(kind: str) -> tuple[GridModel, Condition]:
    if kind == "emu":
        return tiny.emu_flashar().cuda(), PROMPTS
    if kind == "text":
        return tiny.flashar(condition="text").cuda(), tiny.captions([2, 5, 3])
    return tiny.flashar(n_head=4, n_kv_head=2).cuda(), tiny.classes(3)


@pytest.mark.parametrize("runner", ["graphs", "compiled-graphs", "compiled"])
@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("kind", ["class", "text", "emu"])
def test_runners_give_the_codes_of_the_eager_loop(kind: str, plan: str, runner: Any) -> None:
    model, condition = make(kind)
    fast = Engine(model, runner)
    for scale, interval in ((1.0, None), (2.0, None), (2.0, 3)):
        asked: dict[str, Any] = {"cfg_scale": scale, "cfg_interval": interval, "seeds": 4}
        if kind == "emu" and scale != 1:
            asked["unconditional"] = NULLS
        for grid in ((3, 5), (1, 4)):
            codes = fast.generate(condition, grid, plan, **asked)
            assert torch.equal(codes, generate(model, condition, grid, plan, **asked))


def test_a_recording_serves_later_batches_and_new_weights() -> None:
    """Other conditions, seeds and prompts of other lengths replay the same graphs; so does a model that was trained."""
    model, _ = make("emu")
    fast = Engine(model, "graphs")
    for ids, seed in (([5, 6, 4, 9], 0), ([7, 8, 4, 9, 9, 9], 1)):
        prompts = [torch.tensor(ids)] * 2
        codes = fast.generate(prompts, (3, 4), seeds=seed)
        assert torch.equal(codes, generate(model, prompts, (3, 4), seeds=seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    codes = fast.generate(prompts, (3, 4), seeds=seed)
    assert torch.equal(codes, generate(model, prompts, (3, 4), seeds=seed))
    (recording,) = fast._kept.values()
    assert isinstance(recording, Recording)
    assert len(recording.graphs) == 1


def test_a_recording_does_not_read_what_autocast_has_cast() -> None:
    """Under the caller's autocast, low-precision copies of the weights outlive a step, and end with it."""
    model, condition = make("class")

    def mixed(method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with torch.autocast("cuda", torch.bfloat16):  # made here: it takes over whether casts are kept
                return method(*args, **options)

        return call

    for name in ("prefix", "prefill", "step", "step_logits"):  # a model that computes under autocast by itself
        setattr(model, name, mixed(getattr(model, name)))
    fast = Engine(model, "graphs")
    with torch.autocast("cuda", torch.bfloat16):
        codes = fast.generate(condition, (3, 4), seeds=0)
    assert torch.equal(codes, generate(model, condition, (3, 4), seeds=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(fast.generate(condition, (3, 4), seeds=0), generate(model, condition, (3, 4), seeds=0))


def test_a_moved_model_is_recorded_again() -> None:
    """A graph reads the memory in which the parameters were."""
    model, condition = make("class")
    fast = Engine(model, "graphs")
    fast.generate(condition, (2, 3), seeds=0)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    assert torch.equal(fast.generate(condition, (2, 3), seeds=0), generate(model, condition, (2, 3), seeds=0))
    assert len(fast._kept) == 2


def test_long_plans_are_several_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashar_pl.decoding.graphs.STEPS_PER_GRAPH", 5)
    model, condition = make("class")
    fast, steps = Engine(model, "graphs"), []
    codes = fast.generate(condition, (3, 4), "raster", seeds=0, on_step=lambda progress: steps.append(progress.steps))
    assert torch.equal(codes, generate(model, condition, (3, 4), "raster", seeds=0))
    assert len(steps) == 12
    (recording,) = fast._kept.values()
    assert isinstance(recording, Recording)
    assert len(recording.graphs) == 3


def test_auto_falls_back_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recording, "__init__", broken)
    model, condition = make("class")
    fast = Engine(model, "auto")
    assert fast.runner == "graphs"
    with pytest.warns(UserWarning, match="not be recorded, decoding goes on without: operation not permitted"):
        codes = fast.generate(condition, (2, 3), seeds=0)
    assert torch.equal(codes, generate(model, condition, (2, 3), seeds=0))
    assert fast.runner == "eager"
