"""The authors' LlamaGen-FlashAR containers: {"model", "optimizer", "scheduler", "steps", "args"}."""

import argparse
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from flashar_pl.checkpoints.nar import branch_of
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models import FlashAR
from flashar_pl.tensor_files import read_tensors

GATED = tiny.GOLDEN / "flashar" / "llamagen_flashar_tiny_gate_last_version.pt"


def container(path: Path, state: dict[str, torch.Tensor], **arguments: object) -> Path:
    """A file as their training script writes it."""
    content = {"model": state, "optimizer": {}, "scheduler": {}, "steps": 7, "args": argparse.Namespace(**arguments)}
    torch.save(content, path)
    return path


def test_a_checkpoint_that_gates_on_logits_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"mixes logits by a gate on logits \(hv_gate_mlp.0.weight, .* only checkpoints"
    ):
        load_model(GATED, n_head=4)


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
    io = load_file(tiny.GOLDEN / "flashar" / "llamagen_flashar_tiny_gate_io.safetensors")
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
