"""Commands with --device cuda or auto on a pretended GPU: devices are not mixed, results are those of the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluate_toys import evaluation, save_classifier
from pretend_gpu import PretendGPU

from flashar_pl.backbones.registry import examples
from flashar_pl.decoding import prepare
from flashar_pl.layers import rounded


def both(run, *words: object) -> list[str]:
    """Run a command on the CPU and on the pretended GPU; {} in its words becomes cpu and gpu. What it prints."""
    printed = []
    for device in ("cpu", "gpu"):
        with PretendGPU(visible=True):
            chosen = "cpu" if device == "cpu" else "auto"
            code, out, err = run(*(str(word).format(device) for word in words), "--device", chosen)
        assert code == 0, err
        printed.append(out)
    return printed


def test_generate(run, flashar_model, work):
    both(
        run,
        "generate",
        "--checkpoint",
        flashar_model,
        "--classes",
        "3,7",
        "--batch-size",
        2,
        "--cfg-scale",
        2.0,
        "--out",
        "{}",
    )
    assert (np.load("cpu/codes.npy") == np.load("gpu/codes.npy")).all()


def test_weights_of_one_byte_are_rounded_on_their_way_to_the_gpu(run, flashar_model, work, monkeypatch):
    """The whole model on the GPU first would not fit where rounding is needed."""
    monkeypatch.setattr(rounded, "why_not", lambda device: "pretended")
    monkeypatch.setattr(rounded, "multiplies", lambda x, q, exact: False)  # a processor has other products than a GPU
    places = []
    real = prepare.prepare
    monkeypatch.setattr(
        prepare, "prepare", lambda model, *given: places.append(model.device.type) or real(model, *given)
    )
    words = ("generate", "--checkpoint", flashar_model, "--classes", "3", "--num-images", 2, "--weight-format", "int8")
    both(run, *words, "--codes-only", "--out", "{}")
    assert places == ["cpu", "cpu"]
    assert (np.load("cpu/codes.npy") == np.load("gpu/codes.npy")).all()
    settings = json.loads(Path("gpu/settings.json").read_text())["settings"]
    assert (settings["device"], settings["weight_format"]) == ("cuda:0", "int8")


@pytest.mark.slow
def test_evaluate(run, flashar_model, shards, work, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    words = evaluation(flashar_model, shards, save_classifier(work / "features"))
    both(run, *words[:-4], "--num-samples", 34, "--batch-size", 34, "--seed", 3, "--out", "{}")
    cpu, gpu = (json.loads(Path(name, "evaluation.json").read_text()) for name in ("cpu", "gpu"))
    assert gpu["metrics"] == pytest.approx(cpu["metrics"], rel=1e-3)
    assert gpu["samples"]["codes_sha256"] == cpu["samples"]["codes_sha256"]
    assert gpu["run"]["runner"] == "graphs"
    assert gpu["run"]["processes"] == 1


def test_score(run, flashar_model, shards, work):
    words = ["score", "--checkpoint", flashar_model, "--data", shards, "--limit", 20, "--batch-size", 8]
    cpu, gpu = (json.loads(printed) for printed in both(run, *words))
    assert (cpu.pop("device"), gpu.pop("device")) == ("cpu", "cuda")
    assert gpu["nll_nats_per_image"] == pytest.approx(cpu["nll_nats_per_image"], rel=1e-5)


@pytest.mark.slow
def test_benchmark(run, flashar_model, work):
    """Every runner that needs no compiler, the GEMMs as graphs, and the plain decoder."""
    with PretendGPU(visible=True):
        code, _, err = run(
            *("benchmark", "--checkpoint", flashar_model, "--runners", "eager,graphs", "--batch-sizes", "1"),
            *("--grid", "2x2", "--repeats", 1, "--out", "bench"),
        )
    assert code == 0, err
    result = json.loads(Path("bench/results.json").read_text())
    assert not result["failed"]
    assert result["threads"] is None
    assert {row["runner"] for row in result["rows"]} == {"eager", "graphs"}


@pytest.mark.slow
def test_doctor(run):
    """Every check of all tiny models, plain and as graphs."""
    with PretendGPU(visible=True):
        code, out, err = run("doctor", "--dtype", "fp32")
    assert code == 0, err
    assert f"All {9 * len(examples())} checks passed on cuda." in out


def broken(*_: object) -> None:
    raise RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


def test_doctor_survives_what_fails(run, monkeypatch):
    """On a GPU that has no kernel for something, the other checks must still be read."""
    monkeypatch.setattr("flashar_pl.decoding.loop.guide", broken)
    monkeypatch.setattr("flashar_pl.commands.doctor.loss_difference", broken)
    code, out, _ = run("doctor", "--dtype", "fp32", "--device", "cpu", "--weight-formats", "plain")
    assert code == 1
    assert out.count("passed") == 2 * len(examples())  # the two ways without guidance
    assert out.count("FAILED no kernel image is available |") == 3 * len(examples())
