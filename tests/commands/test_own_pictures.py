"""`flashar tokenize images`, `tokenizer train`, and the three commands on one's own pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from own_pictures import make_pictures
from PIL import Image

from flashar_pl.backbones import LlamaGen
from flashar_pl.backbones.llamagen import LlamaGenConfig
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.data.manifest import ConditionSpec
from flashar_pl.data.shards import Manifest, verify
from flashar_pl.data.writer import ShardWriter
from flashar_pl.models import FlashAR, RasterAR

TINY = ("--image-size", 16, "--downsample", 4, "--codes", 16, "--steps", 10, "--workers", 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("own") / "photos")


def test_grey_levels_of_any_pictures(run, photos, work):
    """Modes, sizes and orientations in one folder; names, splits and what was done to the pixels in the manifest."""
    code, out, err = run(
        "tokenize", "images", photos, "--out", "icons", "--tokenizer", "pixels:8", "--image-size", 8, "--workers", 0
    )
    assert code == 0, err
    assert "54 train, 3 validation, 3 test (by content)" in out
    assert "exif: turned upright" in out
    manifest = Manifest.load("icons")
    assert (manifest.grid, manifest.vocabulary, manifest.crops) == ((8, 8), 8, 2)
    assert manifest.class_names == ("bee", "cup", "owl")
    assert manifest.preparation["side"] == "8 pixels"
    assert manifest.preparation["crop"].startswith("centre square")
    assert verify("icons").samples == {"train": 54, "validation": 3, "test": 3}
    assert run("tokenize", "images", photos, "--out", "icons", "--tokenizer", "pixels:8", "--image-size", 8)[0] == 0


def test_a_tokenizer_is_trained_once_and_kept(run, refused, photos, work, monkeypatch):
    """Also in a home that cannot be written, where a manifest bears no marks."""
    monkeypatch.setenv("XDG_STATE_HOME", str(photos / "notes.txt"))
    code, out, err = run("tokenize", "images", photos, "--out", "mine", "--one-class", "--no-mirror", *TINY)
    assert code == 0, err
    assert "PSNR" in out
    assert sorted(path.name for path in Path("mine/tokenizer").iterdir()) == [
        "reconstructions.png", "tokenizer.json", "tokenizer.safetensors",
    ]  # fmt: skip
    manifest = Manifest.load("mine")
    assert (manifest.grid, manifest.vocabulary, manifest.crops, manifest.class_names) == ((4, 4), 16, 1, ("photos",))
    assert manifest.tokenizer["weights"] == str(Path("mine/tokenizer/tokenizer.safetensors").absolute())
    code, out, err = run("tokenize", "images", photos, "--out", "mine", "--one-class", "--no-mirror", *TINY)
    assert code == 0, err
    assert "PSNR" not in out, "trained again"
    asked = ("tokenize", "images", photos, "--out", "mine", "--one-class", "--no-mirror", *TINY, "--codes", 32)
    assert "was trained with codes = 16; this command has 32" in refused(*asked), "the old tokenizer, without a word"
    words = ("--weights", "mine/tokenizer/tokenizer.safetensors", "--workers", 0)
    code, _, err = run("tokenize", "images", photos / "bee", "--out", "other", *words)
    assert code == 0, err
    assert Manifest.load("other").grid == (4, 4), "the side is that of the tokenizer's training"


def test_tokenizer_train_refuses(run, refused, photos, work):
    Path("there").mkdir()
    assert "there exists" in refused("tokenizer", "train", photos, "--out", "there")
    assert "expected downsample one of" in refused("tokenizer", "train", photos, "--out", "t", "--downsample", 5)
    assert "is no folder" in refused("tokenizer", "train", "nowhere", "--out", "t")
    assert "needs FOLDER" in refused("tokenizer", "train", "--out", "t")
    assert "has no weights" in refused("tokenize", "images", photos, "--out", "x", "--tokenizer", "vq16")
    assert [path.name for path in work.iterdir()] == ["there"]


@pytest.mark.slow
def test_report_of_captioned_images(run, work, tiny_text):
    """Guards a report that knows classes only: samples are drawn for the test split's captions."""
    raster, flashar, shards = tiny_text
    words = ("--raster", raster, "--flashar", flashar, "--data", shards, "--out", "report", "--samples", 40)
    code, _, err = run("report", *words, "--timed-images", 1)
    assert code == 0, err
    rows = json.loads(Path("report/report.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows.values()] == [None] * 4
    assert all(row["fid"] is not None and row["images"] == 5 for row in rows.values())
    assert "knows no classes" in Path("report/report.md").read_text()


@pytest.fixture
def tiny_text(tmp_path) -> tuple[str, str, str]:
    """A raster model, a FlashAR model and shards of images with text features."""
    sizes = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": 8}
    config = LlamaGenConfig(**sizes, condition="text", caption_dim=6, caption_positions=5)
    rng = np.random.default_rng(0)
    facts = {"tokenizer": {"kind": "pixels", "levels": 8}, "grid": (4, 4), "vocabulary": 8, "name": "captions"}
    condition = ConditionSpec("text-features", length=5, width=6)
    with ShardWriter(tmp_path / "shards", condition=condition, **facts) as writer:
        for split, n in (("train", 40), ("validation", 5), ("test", 5)):
            texts = [rng.normal(size=(1 + i % 5, 6)).astype(np.float32) for i in range(n)]
            writer.write(split, rng.integers(0, 8, (n, 4, 4)), ids=np.arange(n), features=texts)
    for name, each in (("raster", RasterAR(LlamaGen(config))), ("flashar", FlashAR(LlamaGen(config), 1))):
        note = Description(each.config(), grid=(4, 4), tokenizer=facts["tokenizer"])
        save_model(tmp_path / "models" / name, each, note)
    return str(tmp_path / "models/raster"), str(tmp_path / "models/flashar"), str(tmp_path / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 2, 3, 12])
def test_own_pictures_in_three_commands(run, photos, work, classes):
    """The documented commands, with fewer steps: no error and no hand-made file, for any number of classes."""
    if classes in (1, 12):
        names = ("",) if classes == 1 else tuple(f"c{i:02d}" for i in range(classes))
        photos = make_pictures(work / "photos", names, each=60 // classes)
    else:
        shutil.copytree(photos, work / "photos")
        if classes == 2:
            shutil.rmtree(work / "photos" / "owl")
    few = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 2, "--trainer.accelerator", "cpu")
    mine = ("--data.shards", "data/mine")
    commands = [
        ("tokenize", "images", "photos", "--out", "data/mine", *TINY),
        ("fit", "--config", "experiments/own_images.yaml", *mine, *few),
        ("fit", "--config", "experiments/own_images_flashar.yaml", *mine, *few),
        (
            "report", "--raster", "runs/own/raster/checkpoints/best.ckpt", "--data", "data/mine", "--samples", 40,
            "--flashar", "runs/own/flashar/checkpoints/best.ckpt", "--out", "runs/own/report", "--timed-images", 1,
        ),
    ]  # fmt: skip
    for words in commands:
        code, _, err = run(*words)
        assert code == 0, err
    values = json.loads(Path("runs/own/report/report.json").read_text())
    assert [row["steps"] for row in values["rows"].values()] == [16, 7, 7, 7]
    assert (values["rows"]["flashar"]["accuracy"] is None) == (classes == 1)
    assert values["bounds"] == []
    assert Path("runs/own/report/classifier/classifier.safetensors").is_file()
    assert min(Image.open("runs/own/report/samples.png").size) > 100
    if classes == 3:
        code, out, err = run(
            "evaluate", "--checkpoint", "runs/own/flashar/checkpoints/best.ckpt", "--reference", "photos", "--out", "e",
            "--reference-crop", "centre", "--features", "runs/own/report/classifier", "--num-samples", 40,
        )  # fmt: skip
        assert code == 0, err
        assert "fid" in out
