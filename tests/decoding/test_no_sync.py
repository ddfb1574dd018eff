"""The decoding loop never waits for the device: no operation in it needs a value on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from flashar_pl.backbones import Condition
from flashar_pl.decoding import Engine, engine
from flashar_pl.models.base import GridModel

SYNCHRONISING = {
    "aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::unique", "aten::_unique2", "aten::bincount", "aten::unique_consecutive",
}  # fmt: skip
"""Operations that copy a value to the host, or whose output's shape depends on values."""
PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]
NULLS = [torch.tensor([1, 2, 9])] * 2
SETTINGS = [
    {"top_k": 9, "top_p": 0.9, "temperature": 0.8, "cfg_interval": 1, "cfg_scale": 2.0},
    {"greedy": True, "cfg_scale": 1.0},
]


def make(kind: str) -> tuple[GridModel, Condition, dict[str, Any]]:
    """A model, conditions of two samples, and what guidance needs besides. Prompts have two lengths, so a mask."""
    if kind == "emu":
        return tiny.emu_flashar(), PROMPTS, {"unconditional": NULLS}
    return tiny.flashar(intra={"groups": 2} if kind == "intra" else None), tiny.classes(2), {}


def operations_of(monkeypatch: pytest.MonkeyPatch, call: Any) -> set[str]:
    """Names of the operations that run inside the loop while `call` runs, from its first step to its last."""
    real = engine.decode
    found: set[str] = set()

    def decode(*arguments: Any, **of_a_cpu: Any) -> Iterator[int]:  # prompts by length, which reads them
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            yield from real(*arguments)
        found.update(event.key for event in trace.key_averages())

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", decode)
        call()
    return found


@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("kind", ["llamagen", "emu", "intra"])
def test_nothing_in_the_loop_needs_a_value_on_the_host(kind, plan, monkeypatch) -> None:
    """Guards the loop against an `if tensor`, `int(tensor)`, boolean index or the like: each stops the GPU's queue."""
    model, condition, guidance = make(kind)
    runner = Engine(model, "eager")
    for settings in SETTINGS:
        options = {"seeds": 0, **(guidance if settings["cfg_scale"] != 1 else {}), **settings}
        for _ in range(2):  # the first makes what a plan keeps
            found = operations_of(monkeypatch, lambda: runner.generate(condition, (2, 3), plan, **options))  # noqa: B023
        assert "aten::mm" in found or "aten::linear" in found, "the profiler saw no decoding at all"
        assert not found & SYNCHRONISING


def test_the_profiler_would_see_one(monkeypatch) -> None:
    """The test above must be able to fail."""
    model, condition, _ = make("llamagen")
    real = engine.decode

    def decode(*arguments: Any) -> Iterator[int]:
        for t in real(*arguments):
            int(torch.ones(2).sum())
            torch.ones(2)[torch.ones(2) > 0]
            yield t

    monkeypatch.setattr(engine, "decode", decode)
    found = operations_of(monkeypatch, lambda: Engine(model, "eager").generate(condition, (3, 4), seeds=0))
    assert {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} <= found


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["eager", "graphs"])
@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("kind", ["llamagen", "emu"])
def test_a_gpu_is_never_waited_for_inside_the_loop(kind, plan, runner, monkeypatch) -> None:
    """The first call may wait: plans are copied to the device once, and graphs are recorded."""
    model, condition, guidance = make(kind)
    gpu = Engine(model.to("cuda"), runner)
    real_decode, real_replay = engine.decode, engine.Recording.replay

    def decode(*arguments: Any) -> Iterator[int]:
        with synchronisation_is_an_error():
            yield from real_decode(*arguments)

    def replay(*arguments: Any) -> torch.Tensor:
        with synchronisation_is_an_error():
            return real_replay(*arguments)

    for settings in SETTINGS:
        options = {"seeds": 0, **(guidance if settings["cfg_scale"] != 1 else {}), **settings}
        first = gpu.generate(condition, (2, 3), plan, **options)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "decode", decode)
            patch.setattr(engine.Recording, "replay", replay)
            again = gpu.generate(condition, (2, 3), plan, **options)
        assert torch.equal(first, again)
