"""`flashar probe`: it finds the layer that knows the code below, and leaves the model alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from flashar_pl.backbones.base import Backbone
from flashar_pl.commands.probe import ProbeOptions, depth_of, probe
from flashar_pl.grid import diagonal_plan, raster_plan
from flashar_pl.models.probe import LayerProbe, layer_states
from flashar_pl.options import ModelOptions, PlanOptions


def test_states_are_those_of_the_layers() -> None:
    """The last one, normalised, gives the raster logits."""
    model = tiny.backbone().eval()
    codes, condition, plan = tiny.codes(2, 3, 4), tiny.classes(2), raster_plan(3, 4)
    states = layer_states(model, codes, condition, plan)
    assert len(states) == model.n_layer + 1
    assert states[0].shape == (2, 12, model.dim)
    torch.testing.assert_close(states[0], model.embed(codes.flatten(1)))
    logits = model.head(model.norm(states[-1]))[:, :-1]  # of every cell but the first, from the cell before it
    torch.testing.assert_close(logits, model.raster_logits(codes, condition).flatten(1, 2)[:, 1:])


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny.backbone, raster_plan(3, 4)),
        (tiny.backbone, diagonal_plan(3, 4)),
        (tiny.emu, raster_plan(3, 4, row_end=True)),
        (tiny.emu, diagonal_plan(3, 4)),
    ],
)
def test_the_loss_is_that_of_the_code_below(make: Any, plan: Any) -> None:
    """Guards slots of another order: the state at (p, q) predicts the code at (p + 1, q)."""
    model: Backbone = make().eval()
    codes = tiny.codes(2, 3, 4)
    condition = [torch.tensor([5, 6])] * 2 if model.row_ends else tiny.classes(2)
    states = layer_states(model, codes, condition, plan)
    each = LayerProbe(model, [1])
    loss, nll = each.nll(states, codes, plan)
    at = states[1][:, plan.slot].unflatten(1, (3, 4))[:, :-1]  # (B, 2, 4, D)
    unit = at / (at.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    logits = model.head(model.norm(unit))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 2), codes[:, 1:].flatten() + model.first_code, reduction="none"
    )
    torch.testing.assert_close(nll.flatten(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.mean(), atol=1e-4, rtol=1e-4)


def test_weights_go_to_the_layer_that_knows() -> None:
    """A state that holds the code below must win against noise."""
    model, plan = tiny.backbone().eval(), raster_plan(3, 4)
    torch.manual_seed(0)
    each = LayerProbe(model, [0, 1])
    optimiser = torch.optim.AdamW(each.parameters(), lr=0.03)
    table = torch.randn(model.vocabulary, model.dim)
    for _ in range(60):
        codes = torch.randint(0, model.vocabulary, (8, 3, 4))
        known = table[codes.roll(-1, 1)].flatten(1, 2)  # at (p, q): the code at (p + 1, q)
        optimiser.zero_grad()
        loss, _ = each.nll([torch.randn_like(known), known], codes, plan)
        loss.backward()
        optimiser.step()
    assert each.weights[1] > 0.7
    assert loss < 1.0


def test_the_command(run: Any, raster_model: str, shards: str, work: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["--checkpoint", raster_model, "--data", shards, "--steps", 12, "--batch-size", 16, "--limit", 40]
    code, out, err = run("probe", *words, "--out", "one")
    assert code == 0, err
    found = json.loads((work / "one/probe.json").read_text())
    assert sum(found["weights"]) == pytest.approx(1)
    assert found["branch_layer"] == depth_of(found["weights"])
    for nll in found["nll"].values():
        assert nll["after"] < nll["before"]
    assert (work / "one/probe.png").stat().st_size > 5000
    assert "| embeddings |" in out
    again = probe(
        ProbeOptions(shards, "two", steps=12, limit=40), ModelOptions(raster_model), PlanOptions(batch_size=16)
    )
    assert again["weights"] == found["weights"], "equal seeds, equal result"


def test_depth() -> None:
    assert depth_of([0.1, 0.4, 0.45, 0.05]) == 2
    assert depth_of([0.25] * 4) == 3
    assert depth_of([1.0]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", 0), "steps is 0"),
        (("--learning-rate", 0), "learning_rate is 0"),
        (("--batch-size", 100000), "fewer than one batch"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_wrong_input(refused: Any, raster_model: str, shards: str, work: Path, words: Any, message: str) -> None:
    given = {"--data": shards, "--checkpoint": raster_model, "--out": "out", **{words[0]: words[1]}}
    assert message in refused("probe", *(word for pair in given.items() for word in pair))
    assert not (work / "out").exists()
