"""Moments in fewer bytes: bfloat16 rounded at random, and torchao's 8 bits where it is installed."""

import sys
from pathlib import Path

import pytest
import torch
from sharded_ranks import go, run
from training_toys import OptimiserConfig, make_module

from flashar_pl.training.optim import adamw
from flashar_pl.training.sharded.compact_adamw import MOMENTS, CompactAdamW, round_at_random


def test_rounding_keeps_the_expectation() -> None:
    """Rounded to the nearest, every one of these would be 1.0."""
    torch.manual_seed(0)
    x = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way to the next bfloat16
    rounded = round_at_random(x)
    assert set(rounded.float().unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-10, abs=5e-5)
    exact = torch.tensor([0.0, -1.5, 3.0e38, 2.0**-130])
    assert torch.equal(round_at_random(exact.bfloat16().float()), exact.bfloat16())
    assert torch.equal(round_at_random(-x).float().unique(), torch.tensor([-1 - 2**-7, -1.0]))


def test_second_moment_decays() -> None:
    """At beta2 = 0.999 a step changes it by an eighth of a bfloat16 unit: to the nearest, it would stay for ever."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimiser = CompactAdamW([weight], lr=1e-3, betas=(0.9, 0.999))
    weight.grad = torch.ones(4096)
    for _ in range(20):
        optimiser.step()
    before = optimiser.state[weight]["exp_avg_sq"].double().mean()
    weight.grad = torch.zeros(4096)
    for _ in range(200):
        optimiser.step()
    after = optimiser.state[weight]["exp_avg_sq"].double().mean()
    assert float(after / before) == pytest.approx(0.999**200, rel=5e-3)


def test_follows_adamw() -> None:
    """Same weights as float32 moments within the rounding, weight decay and bias correction included."""
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    found = []
    for kind in (torch.optim.AdamW, CompactAdamW):
        weight = torch.nn.Parameter(start.clone())
        optimiser = kind([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        target = torch.ones(64, 64)
        for _ in range(50):
            optimiser.zero_grad()
            (weight - target).square().sum().backward()
            optimiser.step()
        found.append(weight.detach())
    assert float((found[0] - found[1]).abs().max()) < 7e-3  # six standard deviations of the rounding
    assert float((found[0] - start).abs().mean()) > 0.2


def test_copies_on_two_ranks_stay_equal() -> None:
    """Ranks draw other numbers; rounded by these, the weights of DDP's ranks and of `replicas` drifted apart."""
    found = []
    for rank in range(2):
        torch.manual_seed(rank)
        weight = torch.nn.Parameter(torch.zeros(64))
        optimiser = CompactAdamW([weight])
        for step in range(3):
            weight.grad = torch.linspace(-1, 1, 64) + step
            optimiser.step()
        found.append(torch.stack([weight.detach(), *(optimiser.state[weight][m].float() for m in MOMENTS)]))
    assert torch.equal(*found)


def test_state_keeps_its_size_when_loaded() -> None:
    """torch casts a loaded state to the dtype of its parameter."""
    weight = torch.nn.Parameter(torch.zeros(8))
    optimiser = CompactAdamW([weight])
    weight.grad = torch.ones(8)
    optimiser.step()
    other = CompactAdamW([torch.nn.Parameter(torch.zeros(8))])
    other.load_state_dict(optimiser.state_dict())
    (state,) = other.state.values()
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.bfloat16}
    assert float(state["step"]) == 1


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_a_run_with_small_moments_continues(toy_shards: str, tmp_path: Path, strategy: str) -> None:
    """Losses near those of float32 moments; an interrupted run equals a whole one, because generators are kept."""
    job = {"root": str(tmp_path), "shards": toy_shards, "devices": 1, "strategy": strategy}
    if strategy == "sharded":
        job["options"] = {"compute": "fp32"}
    wide = run({**job, "name": "wide"})
    whole = run({**job, "name": "whole", "state": "bf16", "save": 1})
    again = run({**job, "name": "again", "state": "bf16", "ckpt": str(tmp_path / "step=2.ckpt")})
    assert again["losses"] == {step: whole["losses"][step] for step in again["losses"]}
    assert whole["losses"][10] == pytest.approx(wide["losses"][10], abs=0.02)
    assert whole["losses"][10] < whole["losses"][1] - 0.2


def test_8_bits_need_torchao(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    module = make_module(optimiser=OptimiserConfig(state="8bit"))
    module.configure_model()
    with pytest.raises(ValueError, match=r"pip install 'flashar-pl\[large\]'"):
        adamw(module.net, OptimiserConfig(state="8bit"))


@pytest.mark.slow
def test_8_bits_train_every_parameter_on_every_number_of_ranks(toy_shards: str, tmp_path: Path, monkeypatch) -> None:
    """The gate's last layer has one row, so the second rank holds none of it. Compiled for DTensors, the step of such a
    parameter did nothing on either rank, depending on which of them had compiled first."""
    pytest.importorskip("torchao.optim")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    job = {"root": str(tmp_path), "shards": toy_shards, "strategy": "sharded", "options": {"compute": "fp32"}}
    job |= {"state": "8bit", "dim": 64, "max_steps": 4}
    go([{**job, "name": "two", "save": 2}, {**job, "name": "again", "ckpt": f"{tmp_path}/step=2.ckpt"}], devices=2)
    two, again = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "again"))
    alone = run({**job, "name": "alone", "devices": 1})
    for step, loss in alone["losses"].items():
        assert two["losses"][step] == pytest.approx(loss, abs=2e-3), step
    for name, value in alone["weights"].items():
        assert float((two["weights"][name] - value).abs().max()) < 5e-3, name
    assert again["losses"] == {step: two["losses"][step] for step in (3, 4)}
    assert float(two["weights"]["net.dual_head.gate.out.weight"].abs().max()) > 0.01
    assert float(two["weights"]["net.dual_head.gate.out.bias"].abs().max()) > 0.01


def test_defaults_are_those_of_torch() -> None:
    weight = [torch.nn.Parameter(torch.ones(1))]
    known = torch.optim.AdamW(weight).defaults
    assert CompactAdamW(weight).defaults == {name: known[name] for name in ("lr", "betas", "eps", "weight_decay")}
