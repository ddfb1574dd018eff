"""The authors' LlamaGen-FlashAR containers: {"model", "optimizer", "scheduler", "steps", "args"}."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from flashar_pl.checkpoints.nar import branch_of
from flashar_pl.checkpoints.official import write_official
from flashar_pl.decoding import generate
from flashar_pl.models import FlashAR
from flashar_pl.models.dual_head import Split
from flashar_pl.tensor_files import read_tensors

GATED = tiny.GOLDEN / "flashar" / "llamagen_flashar_tiny_gate_last_version.pt"
GATED_IO = GATED.with_name("llamagen_flashar_tiny_gate_io.safetensors")


def container(path: Path, state: dict[str, torch.Tensor], **arguments: object) -> Path:
    """A file as their training script writes it."""
    content = {"model": state, "optimizer": {}, "scheduler": {}, "steps": 7, "args": argparse.Namespace(**arguments)}
    torch.save(content, path)
    return path


def test_a_gate_on_logits_is_the_authors(tmp_path: Path) -> None:
    """Their container: logits, gate, losses, greedy codes and, back, every tensor. A gate that reads states, an average
    at (0, 0), guidance before fusion or means of the split loss over other targets would differ."""
    io, state = load_file(GATED_IO), read_tensors(GATED)["model"]
    model = FlashAR.from_pretrained(GATED, n_head=4)
    assert (model.branch_layer, model.vertical_layers, model.fusion) == (2, 1, "logit_gate")
    codes, classes = io["in/tokens"].view(-1, 4, 4), io["in/class_ids"]
    with torch.no_grad():
        out = model(codes, classes)
    torch.testing.assert_close(out.fused.flatten(1, 2), io["out/logits_fused"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.gate, io["out/gate"], atol=1e-5, rtol=0)
    expected = io["out/loss"] + 0.1 * io["out/loss_gate_collapse"]
    for options, loss in (
        ({"gate_collapse": 0.1}, expected),
        ({"split": Split(0.5)}, io["out/loss_split_lam0.5"]),
        ({"split": Split(0.5, 0.5)}, io["out/loss_split_lam0.5_col0boost0.5"]),
    ):
        given = model.loss(codes, classes, aux_weight=0.0, **options)["loss"].detach()
        torch.testing.assert_close(given, loss, atol=1e-5, rtol=1e-5)
    for scale in (1, 2):
        drawn = generate(model, io["in/generate_class_ids"], grid=(4, 4), cfg_scale=float(scale), greedy=True)
        assert torch.equal(drawn, io[f"out/cfg{scale}_tokens"])
    again = FlashAR.from_pretrained(write_official(tmp_path / "again.pt", model, GATED, None), n_head=4)
    assert (again.branch_layer, again.vertical_layers) == (2, 1)
    with pytest.raises(ValueError, match=r"do not tell the branch layer; expected a \.pt file"):
        write_official(tmp_path / "again.safetensors", model, GATED, None)
    back = FlashAR.from_nar(again.to_nar(), n_head=4, branch_layer=2).to_nar()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_gate_on_logits_learns_alone() -> None:
    """Guards a gradient of the gate into the trunk or the heads, which the authors' code cuts, and a split loss that
    moves the gate."""
    model = tiny.flashar(fusion="logit_gate", corner="fused").double()
    codes, classes = tiny.codes(3, 3, 4), tiny.classes(3)
    names = [name for name, _ in model.named_parameters()]

    def moved(**options: Any) -> set[str]:
        off, on = (model.loss(codes, classes, **each)["loss"] for each in ({}, options))
        grads = [torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
                 for loss in (off, on)]  # fmt: skip
        return {name for name, a, b in zip(names, *grads, strict=True) if not torch.allclose(a, b, atol=1e-12)}

    gate = {name for name in names if name.startswith("dual_head.gate.")}
    assert moved(gate_collapse=0.1) == gate
    split = model.loss(codes, classes, split=Split(0.3, 0.5))["loss"]
    parameters = [model.get_parameter(name) for name in sorted(gate)]
    assert not any(each.any() for each in torch.autograd.grad(split, parameters))


def test_what_does_not_say_the_branch_layer_or_mixes_by_one_number_is_refused() -> None:
    state = read_tensors(GATED)["model"]
    with pytest.raises(ValueError, match=r"do not tell the branch layer; give last_version.pt"):
        FlashAR.from_nar(state, n_head=4)
    mixed = {name: value for name, value in state.items() if not name.startswith("hv_")} | {
        "hv_mix_logit": torch.ones(())
    }
    with pytest.raises(ValueError, match=r"by one number \(hv_mix_logit\)"):
        FlashAR.from_nar(mixed | {"hv_mix_logit": torch.ones(())}, n_head=4)


def test_average_fusion_imports(tmp_path: Path) -> None:
    """last_version.pt with both heads averaged, branch after the last layer: logits of the official code."""
    state, io = tiny.flashar_golden("llamagen_flashar_tiny_nogate")
    path = container(tmp_path / "last_version.pt", state, vertical_start_layer=-1, medusa_attention_num=1)
    model = FlashAR.from_pretrained(path, n_head=4)
    assert (model.branch_layer, model.vertical_layers, model.fusion) == (3, 1, "average")
    codes = io["in/tokens"].view(-1, 4, 4)
    with torch.no_grad():
        fused = model(codes, io["in/class_ids"]).fused.flatten(1, 2)
    torch.testing.assert_close(fused, io["out/logits_fused"], atol=1e-4, rtol=1e-4)


def test_the_branch_layer_comes_from_the_arguments(tmp_path: Path) -> None:
    """Weights alone cannot tell it: read as m = L, the vertical logits of this file would silently be others.

    The golden model has a gate; without it the file is one of average fusion with the same two heads.
    """
    content = read_tensors(GATED)
    state = {name: value for name, value in content["model"].items() if not name.startswith("hv_")}
    io = load_file(GATED_IO)
    codes, classes = io["in/tokens"].view(-1, 4, 4), io["in/class_ids"]
    model = FlashAR.from_pretrained(container(tmp_path / "given.pt", state, **vars(content["args"])), n_head=4)
    assert (model.branch_layer, model.vertical_layers) == (2, 1)
    blind = FlashAR.from_nar(state, n_head=4)
    with torch.no_grad():
        logits, wrong = model(codes, classes), blind(codes, classes)
    # The cells of the last row and column feed no target; row 0 of the arrays is the class token.
    official = {name: io[f"dbg/logits_{name}_raw"][:, 1:].unflatten(1, (4, 4)) for name in "RB"}
    torch.testing.assert_close(logits.horizontal[:, :, :-1], official["R"][:, :, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits.vertical[:, :-1], official["B"][:, :-1], atol=1e-4, rtol=1e-4)
    assert (wrong.vertical[:, :-1] - official["B"][:, :-1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, (5, 1)),
        ({}, (5, 1)),
        ({"vertical_start_layer": -1, "medusa_attention_num": 2}, (4, 2)),
        ({"vertical_start_layer": 3}, (3, 1)),
        ({"vertical_start_layer": 9}, (5, 1)),
        ({"vertical_start_last_minus_depth": True, "medusa_attention_num": 2}, (2, 2)),
    ],
)
def test_rules_of_the_arguments(arguments: dict[str, object] | None, expected: tuple[int, int]) -> None:
    """Six blocks in all."""
    assert branch_of(None if arguments is None else argparse.Namespace(**arguments), 6) == expected
    assert branch_of(arguments, 6) == expected, "saved as vars(args)"


def test_arguments_that_do_not_fit_are_refused() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"medusa_attention_num {k}, and it has 6 blocks"):
            branch_of(argparse.Namespace(medusa_attention_num=k), 6)


def test_from_pretrained_names_the_class_that_fits(tmp_path: Path) -> None:
    from flashar_pl.checkpoints.description import Description
    from flashar_pl.checkpoints.weights import save_model
    from flashar_pl.models import GridModel, RasterAR

    for name, model in (("flashar", tiny.flashar()), ("raster", RasterAR(tiny.backbone()))):
        save_model(tmp_path / name, model, Description(model.config()))
    codes, classes = tiny.codes(2, 3, 3), tiny.classes(2)
    loaded = FlashAR.from_pretrained(tmp_path / "flashar")
    assert not loaded.training
    torch.testing.assert_close(loaded(codes, classes).fused, tiny.flashar()(codes, classes).fused)
    assert type(GridModel.from_pretrained(tmp_path / "raster")) is RasterAR
    with pytest.raises(ValueError, match=r"holds a raster model, not a FlashAR; expected RasterAR\.from_pretrained"):
        FlashAR.from_pretrained(tmp_path / "raster")
    with pytest.raises(ValueError, match="holds a FlashAR model, not a RasterAR"):
        RasterAR.from_pretrained(tmp_path / "flashar")
