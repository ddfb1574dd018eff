"""`flashar tokenize scenes` and `flashar evaluate scenes`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import tiny_backbone
from pretend_gpu import PretendGPU

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.commands import evaluate_scenes
from flashar_pl.commands.evaluate_scenes import count, share
from flashar_pl.data import scenes
from flashar_pl.models import RasterAR
from flashar_pl.models.base import GridModel


def test_counts_are_of_the_prompts_they_belong_to() -> None:
    random = np.random.default_rng(0)
    prompts = [scenes.draw_prompt(random, task) for task in scenes.TASKS * 2]
    codes = np.stack([scenes.draw_codes(scenes.draw_scene(random, prompt)) for prompt in prompts])
    codes[6][codes[6] > 0] += 1  # the first task's second image: every object torn
    found = count(torch.from_numpy(codes), prompts)
    assert found["overall"] == pytest.approx(11 / 12)
    assert {task: each["count"] for task, each in found["tasks"].items()} == {
        task: 2 - (task == "single_object") for task in scenes.TASKS
    }
    assert [found[name]["count"] for name in ("correct", "exact", "torn")] == [11, 11, 1]


def test_the_interval_is_wilsons() -> None:
    assert share(0, 10) == {"count": 0, "images": 10, "share": 0, "low": 0, "high": pytest.approx(0.27753, abs=1e-5)}
    half = share(5, 10)
    assert (half["low"], half["high"]) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))


def test_from_shards_to_counts(run, refused, shards: str, work: Path, monkeypatch) -> None:
    monkeypatch.setattr(scenes, "SIZES", {"train": 6, "test": 18})
    code, out, err = run("tokenize", "scenes")
    assert code == 0, err
    assert "6 train, 18 test images, 8 x 8 codes of 73" in out
    backbone = tiny_backbone(vocab_size=73, condition="text", caption_dim=scenes.WIDTH, caption_positions=5)
    model = RasterAR(backbone)
    save_model(work / "model", model, Description(model.config(), grid=(8, 8), tokenizer={"kind": "scenes"}))
    words = ["evaluate", "scenes", "--checkpoint", "model", "--data", "data/scenes", "--plan", "diagonal",
             "--branch-layer", 1]  # fmt: skip
    for name, batch in (("one", 18), ("two", 5)):
        code, out, err = run(*words, "--out", name, "--batch-size", batch)
        assert code == 0, err
    assert "nats per image" in out
    one, two = (json.loads((work / name / "scenes.json").read_text()) for name in ("one", "two"))
    assert one["torn"] == two["torn"]  # neither depends on the batch
    assert one["likelihood"] == pytest.approx(two["likelihood"], rel=1e-5)
    assert (one["forwards"], one["correct"]["images"], one["likelihood"]["images"]) == (15, 18, 18)
    assert one["cpu_s_per_image"] > 0
    assert np.load(work / "one" / "codes.npy").shape == (18, 8, 8)
    nll = np.load(work / "one" / "nll.npy")
    assert (nll.shape, nll.mean()) == ((18,), one["likelihood"]["nll_nats_per_image"])
    assert "--limit 9 leaves no prompt of two_object, colors, color_attr" in refused(
        *words, "--out", "three", "--limit", 9
    )
    assert "expected what `flashar tokenize scenes` writes" in refused(
        "evaluate", "scenes", "--checkpoint", "model", "--data", shards, "--out", "three"
    )

    def scored(model: GridModel, *given: object) -> None:
        raise ValueError(f"scored on {model.device.type}")

    monkeypatch.setattr(evaluate_scenes, "image_nll", scored)
    with PretendGPU(visible=True):  # weights that are to be rounded wait on the CPU, and the likelihoods do not
        assert "scored on cuda" in refused(*words, "--out", "three", "--device", "cuda", "--weight-format", "int8")
