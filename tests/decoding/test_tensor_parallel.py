"""One model on two devices (gloo processes): the codes of one, half of the weights, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import shared_model
import tiny
import torch
from pair import Pair

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.decoding import generate, tensor_parallel
from flashar_pl.decoding.prepare import prepare
from flashar_pl.decoding.tensor_parallel import check_shares
from flashar_pl.models.base import GridModel
from flashar_pl.options import EngineOptions

EVERY = ["raster", "diagonal", "lossless"]
RARER = {
    "logit gate": ["diagonal"],
    "groups": ["diagonal"],
    "captions": ["diagonal"],
    "raster": ["raster"],
    "PAR": ["regions"],
    "emu": EVERY[2:],
    "emu raster": ["raster"],
    "emu one kv head": EVERY,
    "released": EVERY,
    "code mlp": EVERY,
    "mlp of text": EVERY,
    "video": ["raster", "diagonal"],
}


def compare(pair: Pair, kind: str, plans: list[str]) -> list[dict]:
    found = pair(shared_model.drawn, kind, plans)
    for rank in found:
        for whole, shared, astray in zip(rank["whole"], rank["shared"], rank["astray"], strict=True):
            assert torch.equal(shared, whole)
            assert torch.equal(astray, whole)  # the second device would draw others: the first one's count
    return found


@pytest.mark.parametrize(("kind", "plans"), [("llamagen", EVERY), ("emu", EVERY[:2]), ("biases", ["diagonal"])])
def test_two_devices_draw_the_codes_of_one(pair: Pair, kind: str, plans: list[str]) -> None:
    """Guards which rows and columns are whose, sums and their biases, the order of gathered parts, and a device that
    holds more than its share: norms and the gate alone stay whole."""
    for rank in compare(pair, kind, plans):
        assert rank["held"] < 0.6
        assert rank["planned"] == pytest.approx(1, abs=0.03)  # biases, and codes that two do not divide
        assert rank["kv_heads"] == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RARER)
def test_two_devices_share_every_kind_of_model(pair: Pair, kind: str) -> None:
    compare(pair, kind, RARER[kind])


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    model = tiny.flashar(num_classes=10)
    note = Description(model.config(), grid=(4, 4), tokenizer={"kind": "pixels", "levels": tiny.VOCABULARY})
    save_model(tmp_path / "model", model, note)
    return str(tmp_path / "model")


def words(checkpoint: str, out: Path, *more: object) -> list[str]:
    typed = ("generate", "--checkpoint", checkpoint, "--classes", "1,2", "--num-images", 1, "--cfg-scale", 2)
    return [str(word) for word in (*typed, "--device", "cpu", "--out", out, *more)]


def test_generate_on_two_devices(pair: Pair, checkpoint: str, tmp_path: Path) -> None:
    """Guards ranks that both write, or lay out their share of the weights anew."""
    one = generate(load_model(checkpoint).model, torch.tensor([1, 2]), (4, 4), cfg_scale=2.0, seeds=0)
    two = words(checkpoint, tmp_path / "two", "--tensor-parallel", 2, "--batch-size", 2)
    assert pair(shared_model.command, two) == [0, 0]
    assert (np.load(tmp_path / "two" / "codes.npy") == one.numpy()).all()
    record = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert record["settings"]["tensor_parallel"] == 2
    assert record["settings"]["weight_format"] == "plain"
    assert len(list((tmp_path / "two").glob("*seed*.png"))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tensor-parallel", 3), "tensor_parallel is 3, but 2 processes were started on each machine; give their"),
        (("--tensor-parallel", 2, "--weight-format", "int8"), "weight_format is int8, which --tensor-parallel does"),
        (("--tensor-parallel", 2, "--runner", "fused"), "runner is fused, which --tensor-parallel does not know"),
    ],
)
def test_what_two_devices_do_not_share_is_refused(pair, checkpoint, tmp_path, more, message) -> None:
    """In one line, before a directory is made."""
    first, second = pair(shared_model.said, words(checkpoint, tmp_path / "out", *more))
    assert message in first
    assert (first.count("\n"), second) == (1, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("setting", "given"), [("runner", "fused"), ("weight_format", "fp8")])
def test_what_devices_do_not_share_is_refused_before_they_start(monkeypatch, setting: str, given: str) -> None:
    """Guards a minute of starting processes that then end with the line which was due at once."""
    monkeypatch.setattr(tensor_parallel, "run_on_ranks", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(ValueError, match=f"{setting} is {given}, which --tensor-parallel does not know; expected auto"):
        tensor_parallel.on_devices(2, print, EngineOptions(**{setting: given}))


@pytest.mark.parametrize(
    ("kind", "n", "message"),
    [
        ("llamagen", 3, "tensor_parallel is 3, and the model has 2 query heads, 2 key/value heads and a feed-forward "
         "width of 48; expected one of 1, 2"),
        ("emu one kv head", 8, "expected one of 1, 2, 4"),
        ("emu", 3, "expected one of 1, 2, 4"),
    ],
)  # fmt: skip
def test_heads_that_the_devices_do_not_divide(kind: str, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shares(shared_model.model(kind), n)


def test_a_share_is_not_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards heads whose rows would be packed, and no longer gathered."""
    monkeypatch.setattr(GridModel, "shared", True)
    with pytest.raises(ValueError, match="devices share the model; expected plain"):
        prepare(tiny.flashar(), "packed")
