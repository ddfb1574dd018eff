"""`flashar doctor`: it passes here, and it fails where decoding is wrong."""

import json
import math
import re
from pathlib import Path
from typing import Any

import emu_files
import pytest
import tiny
import torch

from flashar_pl.backbones.registry import examples
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.cli import main
from flashar_pl.commands import doctor as module
from flashar_pl.commands.doctor import doctor
from flashar_pl.console import Missed
from flashar_pl.decoding import generate
from flashar_pl.decoding.parity import misplacement
from flashar_pl.layers import rounded
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.packed import unsupported
from flashar_pl.options import ComputeOptions, PresetOptions, WayOptions

FP32, PLAIN, ALL = ComputeOptions(dtype="fp32"), WayOptions(weight_formats="plain"), PresetOptions()


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tiny_names", lambda: ["emu35"])


def test_all_is_well_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctor(out=str(tmp_path / "doctor.json"))
    ways = 2 if unsupported(torch.bfloat16) is None else 1
    kinds = len(examples())
    assert len(result["checks"]) == kinds * (2 * 2 * 2 + 1) + kinds * (ways * 2 * 2 + 1)
    assert all(check["passed"] for check in result["checks"])
    assert json.loads((tmp_path / "doctor.json").read_text()) == result
    printed = capsys.readouterr().out
    assert f"All {len(result['checks'])} checks passed on cpu." in printed
    assert re.search(rf"\| torch +\| +{re.escape(torch.__version__)} \|", printed)


def test_what_rounded_weights_change_is_said(flashar_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a comparison of the plain weights with themselves, and one of codes under another condition."""
    monkeypatch.setattr(rounded, "exact_on_this_processor", lambda: False)  # else activations are rounded on some
    ways = WayOptions(weight_formats="plain,int8")
    checks = doctor(PresetOptions(checkpoint=flashar_model), ways, FP32)["checks"]
    told = {check["what"]: check["remark"] for check in checks}
    assert {what for what, remark in told.items() if remark} == {
        f"{plan}, eager, int8 weights" for plan in ("diagonal", "raster")
    }
    for remark in filter(None, told.values()):
        found = re.fullmatch(r"([\d.e-]+) nats an image from plain, likeliest code the same in ([\d.]+)%", remark)
        assert found is not None
        assert 1e-3 < float(found[1]) < 5
        assert 90 < float(found[2]) <= 100


def wrong_guidance(a: Any, b: Any, scale: float) -> Any:
    return b + scale * (a - b) * 1.05


def wrong_cache(self: KVCache, layer: int, keys: Any, values: Any) -> Any:
    """Values of the position before."""
    end = self.filled + keys.shape[2]
    self.keys[layer, :, :, self.filled : end] = keys
    self.values[layer, :, :, self.filled : end] = values.roll(1, 1) if self.filled else values
    return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@pytest.mark.parametrize(
    ("where", "fault", "found"),
    [
        ("flashar_pl.decoding.loop.guide", wrong_guidance, "2 of 5 checks failed: emu35, fp32: diagonal, guided"),
        ("flashar_pl.layers.kv_cache.KVCache.append", wrong_cache, "4 of 5 checks failed"),
        ("flashar_pl.benchmarking.plain_loss.AUX_WEIGHT", 0.06, "1 of 5 checks failed: emu35, fp32: training"),
    ],
)
def test_faults_are_found(one_model: None, monkeypatch: pytest.MonkeyPatch, where: str, fault: Any, found: str) -> None:
    """A check that cannot fail would prove nothing."""
    monkeypatch.setattr(where, fault)
    with pytest.raises(Missed, match=found):
        doctor(ALL, PLAIN, FP32)


def test_a_difference_that_is_no_number_is_written(
    one_model: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file of a machine that computes NaN is the one that is wanted most."""
    monkeypatch.setattr("flashar_pl.benchmarking.plain_loss.AUX_WEIGHT", math.nan)
    with pytest.raises(Missed, match="1 of 5 checks failed"):
        doctor(ALL, PLAIN, FP32, out=str(tmp_path / "doctor.json"))
    failed = [each for each in json.loads((tmp_path / "doctor.json").read_text())["checks"] if not each["passed"]]
    assert [(each["difference"], each["remark"][:21]) for each in failed] == [(None, "the difference is nan")]


def test_what_cannot_run_is_said(one_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dtype", "fp32", "--runners", "graphs", "--weight-formats", "plain", "--device", "cpu"]
    assert main(["doctor", *words]) == 1
    printed = capsys.readouterr()
    assert "FAILED runner is graphs, and the model is on cpu" in printed.out
    assert "1 of 2 checks failed" in printed.err


def test_auto_checks_what_the_machine_and_the_runner_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights that cannot be are no failure of the machine."""
    cpu, ways = torch.device("cpu"), WayOptions
    assert module.variants_of(ways("eager,compiled"), cpu, "fp32") == [
        ("eager", "plain"), ("compiled", "plain"), ("eager", "packed"),
    ]  # fmt: skip
    asked = module.variants_of(ways("compiled", "packed"), cpu, "fp32")
    assert ("compiled", "packed") in asked, "asked for: it fails, aloud"
    monkeypatch.setattr("flashar_pl.layers.packed.unsupported", lambda dtype: "no instructions")
    assert module.variants_of(ways(), cpu, "bf16") == [("eager", "plain")]


def test_a_released_checkpoint_is_read_once_for_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the authors' conventions, random prompts beyond a small vocabulary, and loading in vain."""
    read: list[Any] = []

    def counted(options: Any, compute: Any) -> Any:
        read.append(compute.dtype)
        return open_checkpoint(options, compute)

    monkeypatch.setattr("flashar_pl.benchmarking.subjects.open_checkpoint", counted)
    folder = emu_files.write_released(tmp_path / "released")
    result = doctor(PresetOptions(checkpoint=str(folder), grid="3x4"), PLAIN)
    assert [check["what"] for check in result["checks"]] == 2 * [
        f"{p}, eager, plain weights" for p in ("diagonal", "raster")
    ]
    assert read == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "a.ckpt", "--preset", "llamagen-b"], "give either --preset"),
        (["--grid", "4x4"], "the tiny models have a grid"),
        (["--dtype", "fp64"], "--dtype is 'fp64'"),
        (["--runners", "fast"], "runners has 'fast'"),
        (["--checkpoint", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
    ],
)
def test_wrong_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dtype", "fp32", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("plan", ["diagonal", "raster"])
def test_misplacement_is_zero_for_drawn_codes_only(plan: str, scale: float) -> None:
    model = tiny.flashar()
    condition = tiny.classes(3)
    model.train()  # neither of the two drops anything, whatever the mode
    codes = generate(model, condition, (3, 4), plan, scale, seeds=5)
    assert misplacement(model, codes, condition, plan, scale, 5).max() < 1e-6
    assert (misplacement(model, codes, condition, plan, scale, 6) > 1e-3).any(), "other random numbers"
    last = (codes[:, -1, -1] + 1) % model.backbone.vocabulary
    codes[:, -1, -1] = last
    found = misplacement(model, codes, condition, plan, scale, 5)
    assert (found[:, -1, -1] > 0).any()
    assert found[:, :-1].max() < 1e-6, "nothing sees the last cell"
