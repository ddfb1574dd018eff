"""A backbone that a YAML names by class_path, through every command; a checkpoint never says what to import."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evaluate_toys import evaluation, save_classifier

from flashar_pl.backbones import registry
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.decoding import generate
from flashar_pl.training.module import FlashARModule

PATH = "own_backbone.OwnBackbone"
SAVER = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"save_last": True, "every_n_train_steps": 2},
}
OWN = ("--backbone-class", PATH)


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Makes this process as new: it knows the built-in families only."""

    def call() -> None:
        registry.FAMILIES.pop("own", None)

    call()
    yield call
    call()


def configuration(shards: str, out: str, **model: Any) -> str:
    """A YAML of two steps, written beside its run directory."""
    values = {
        "model": {"backbone": {"class_path": PATH, "init_args": {"width": 8}}, **model},
        "data": {"shards": shards, "batch_size": 16, "limit_validation_samples": 32},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "logger": False,
                    "callbacks": [SAVER], "default_root_dir": out, "enable_progress_bar": False},
    }  # fmt: skip
    file = Path(f"{out}.yaml")
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.mark.slow
def test_a_backbone_of_ones_own(run, refused, forget, work, shards, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    raster = configuration(shards, "raster")
    assert run("fit", "--config", raster)[0] == 0
    flashar = configuration(shards, "flashar", flashar={"branch_layer": 1}, init_from="raster/checkpoints/last.ckpt")
    code, _, err = run("fit", "--config", flashar)
    assert code == 0, err
    last = "flashar/checkpoints/last.ckpt"
    stored = torch.load(last, weights_only=True)["flashar"]
    assert stored["model"]["backbone"] == {"kind": "own", "width": 8, "depth": 2, "codes": 17, "classes": 10}
    assert PATH not in json.dumps(stored), "the description names a kind, never what to import"

    module = FlashARModule.load_from_checkpoint(last)
    classes = torch.tensor([3, 3, 7, 7])
    expected = generate(module.evaluated.eval(), classes, (8, 8), cfg_scale=2.0, seeds=5)
    forget()

    for words in (
        ("generate", "--checkpoint", last, "--classes", "3", "--out", "no"),
        ("score", "--checkpoint", last, "--data", shards),
        ("validate", "--ckpt_path", shutil.copy(last, "moved.ckpt"), "--data.shards", shards),
    ):
        assert "--backbone-class" in (message := refused(*words)) or "give the run's YAML too" in message

    draw = ("generate", "--checkpoint", last, *OWN, "--classes", "3,7", "--num-images", 2, "--cfg-scale", 2)
    assert run(*draw, "--seed", 5, "--weight-format", "plain", "--out", "samples")[0] == 0
    assert (np.load("samples/codes.npy") == expected.numpy()).all()
    forget()
    code, out, err = run("score", "--checkpoint", last, *OWN, "--data", shards, "--limit", 20, "--plan", "raster")
    assert code == 0, err
    assert json.loads(out)["images"] == 20
    forget()
    measured = evaluation(last, shards, save_classifier(work / "features"))
    code, _, err = run(*measured, *OWN, "--num-samples", 40, "--out", "evaluation")
    assert code == 0, err
    assert (
        json.loads(Path("evaluation/evaluation.json").read_text())["checkpoint"]["model"]["backbone"]["kind"] == "own"
    )
    forget()
    assert run("validate", "--config", flashar, "--ckpt_path", last)[0] == 0
    forget()
    code, out, err = run("plan", "--config", flashar, "--gpus", 1, "--out", "plan.json")
    assert code == 0, err
    model = load_model(last).model
    assert sum(json.loads(Path("plan.json").read_text())["parameters"].values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    forget()
    assert run("plan", *OWN, "--gpus", 1)[0] == 0
    forget()
    for model in (["--checkpoint", last], []):
        code, out, err = run("benchmark", *OWN, *model, "--repeats", 1, "--grid", "3x3", "--plans", "diagonal")
        assert code == 0, err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_backbone.Missing", "cannot be imported"),
        ("nowhere.Backbone", "No module named 'nowhere'"),
        ("Backbone", "Expected MODULE.CLASS"),
        ("own_backbone.Unfinished", "expected a concrete subclass"),
        ("pathlib.Path", "is no backbone"),
    ],
)
def test_wrong_import_paths(refused, raster_model, path: str, message: str) -> None:
    assert message in refused("generate", "--checkpoint", raster_model, "--backbone-class", path, "--out", "no")


def test_wrong_arguments_of_a_backbone_of_ones_own(refused, forget, work, shards) -> None:
    file = configuration(shards, "run")
    assert "no configuration key 'model.backbone.init_args.widht'; closest: width" in refused(
        "fit", "--config", file, "--model.backbone.init_args.widht", 3
    )
