"""`flashar benchmark train`: the plain loss is the same loss, and the memory columns see what they should."""

import json

import pytest
import torch
from tiny import classes, codes, flashar

from flashar_pl.backbones import build_backbone
from flashar_pl.benchmarking.plain_loss import plain_loss
from flashar_pl.commands.benchmark_train import report
from flashar_pl.models import FlashAR
from flashar_pl.models.lora import without_adapters


@pytest.mark.parametrize("corner", ["horizontal", "fused"])
def test_the_plain_loss_is_the_same_loss(corner):
    """Guards the comparison: another loss would be faster or slower for the wrong reason."""
    model = flashar(corner=corner)
    args = codes(3, 4, 5), classes(3), model.make_plan(None, 4, 5)
    gradients = []
    for loss in (model.loss(*args)["loss"], plain_loss(model, *args)):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(loss, plain_loss(model, *args), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.fixture
def narrow(monkeypatch):
    """A model of one narrow layer with all 16,384 codes, in place of the preset's."""
    torch.manual_seed(0)
    model = FlashAR(build_backbone({"preset": "llamagen-b", "dim": 32, "n_layer": 1, "n_head": 2}), 0)
    monkeypatch.setattr("flashar_pl.benchmarking.subjects.Subject.model", lambda *_: model)
    return model


WORDS = ("--preset", "llamagen-b", "--layers", 1, "--repeats", 1, "--device", "cpu")


@pytest.mark.slow
def test_a_training_benchmark(work, run, narrow):
    """Three logit tensors of 256 x 16,384 floats are 16 MiB each: the chunked loss must stay far below."""
    code, out, err = run("benchmark", "train", *WORDS, "--batch-size", 4, "--grid", "8x8", "--out", "train.json")
    assert code == 0, err
    result = json.loads((work / "train.json").read_text())
    rows = {(row["stage"], row["loss"]): row for row in result["rows"]}
    assert rows.keys() == {(stage, loss) for stage in (1, 2) for loss in ("chunked", "plain")}
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["seconds"])
    assert "| 1, chunked  |" in out or "| 1, chunked |" in out
    if not rows[2, "plain"]["loss_bytes"]:
        pytest.skip("this system does not report resident memory")
    for stage in (1, 2):
        assert rows[stage, "plain"]["loss_bytes"] > 2 * 16 * 2**20
        assert rows[stage, "chunked"]["loss_bytes"] < 0.6 * rows[stage, "plain"]["loss_bytes"]


@pytest.mark.slow
def test_a_step_with_a_frozen_backbone(work, run, narrow):
    """A step of a LoRA run trains, and holds moments of, what is not frozen."""
    pytest.importorskip("peft")
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    words = ("--batch-size", 1, "--grid", "4x4", "--lora", 2, "--out", "lora.json")
    code, out, err = run("benchmark", "train", *WORDS, *words)
    assert code == 0, err
    result = json.loads((work / "lora.json").read_text())
    frozen = [name for name in before if name.startswith("backbone.")]
    assert result["frozen"] == sum(before[name].numel() for name in frozen)
    assert f"{result['frozen']:,} of them frozen (LoRA of rank 2)" in out
    silent = result | {"rows": [row | {"peak_bytes": 0} for row in result["rows"]]}
    assert "| unknown | unknown | unknown |" in " ".join(report(silent).split()), "macOS tells no peak of a block"
    with without_adapters(narrow):
        after = narrow.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in frozen)
        assert not torch.equal(before["dual_head.horizontal.weight"], after["dual_head.horizontal.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "batch_size is 0"),
        (["--preset", "llamagen-b", "--layers", "0"], "layers is 0; expected 1 or more"),
        (["--preset", "llamagen-b", "--dtype", "fp16"], "dtype is fp16"),
    ],
)
def test_wrong_options_are_refused(words, message, refused, work):
    assert message in refused("benchmark", "train", "--device", "cpu", *words)
