"""`flashar tokenize check`: sound shards pass, every kind of damage gives exit code 2, pictures show the codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import make_images, vq_state

from flashar_pl.data.encode import with_weights
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter
from flashar_pl.tokenizers import VQ16


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A directory with `s`, shards of two crops, and `vq.pt`, their tokenizer."""
    from flashar_pl.cli import main

    root = tmp_path_factory.mktemp("made")
    torch.save({"model": vq_state()}, root / "vq.pt")
    make_images(root / "images", each=4)
    words = ["--images", root / "images", "--out", root / "s", "--weights", root / "vq.pt", "--image-size", 16]
    assert main(["tokenize", "imagenet", *map(str, words), "--workers", "0"]) == 0
    return root


@pytest.fixture
def made(tmp_path, original) -> tuple[Path, Path]:
    """(a copy of the shards, a copy of the weights that they name)."""
    shutil.copytree(original / "s", tmp_path / "s")
    shutil.copy(original / "vq.pt", tmp_path / "vq.pt")
    with_weights(Manifest.load(tmp_path / "s"), str(tmp_path / "vq.pt")).save(tmp_path / "s")
    return tmp_path / "s", tmp_path / "vq.pt"


def test_summary_of_the_digits(run, shards):
    code, out, _ = run("tokenize", "check", shards)
    assert code == 0
    assert "1 crops of 8 x 8 codes of 17 (pixels)" in out
    assert "train: 1,400 samples; 17 different codes in 1,400 of them" in out
    assert "10 classes" in out
    assert "0 without any" in out


def test_classes_without_samples_are_named(run, tmp_path):
    condition = ConditionSpec("class", num_classes=4)
    with ShardWriter(
        tmp_path / "s",
        name="x",
        tokenizer={"kind": "pixels", "levels": 5},
        grid=(2, 2),
        vocabulary=5,
        condition=condition,
    ) as writer:
        writer.write("train", np.ones((3, 2, 2), dtype=np.int64), ids=[0, 1, 2], labels=[1, 1, 3])
    out = run("tokenize", "check", tmp_path / "s")[1]
    assert "2 without any: 0, 2" in out
    assert "1 different codes in 3 of them, perplexity 1" in out


def test_the_picture_shows_decoded_samples(run, made, tmp_path):
    """Guards the picture against showing anything but what training sees."""
    shards, _ = made
    code, out, _ = run("tokenize", "check", shards, "--decode", 3, "--out", tmp_path / "c.png")
    assert code == 0
    assert "3 samples of the train split, id (condition):" in out
    assert "of their codes are unchanged after decoding and encoding" in out
    from flashar_pl.data.shards import ShardReader

    reader = ShardReader(Manifest.load(shards), "train")
    model = VQ16.from_official(vq_state())
    every = [reader.read(np.arange(12), np.full(12, k)).codes for k in (0, 1)]
    decoded = model.decode(torch.from_numpy(np.concatenate(every))).numpy()  # (24, 3, 16, 16)
    with Image.open(tmp_path / "c.png") as image:
        sheet = np.asarray(image).transpose(2, 0, 1)
    tile = sheet[:, :64, :64][:, ::4, ::4]
    assert (decoded == tile).all(axis=(1, 2, 3)).any()


def test_pixels_decode_without_weights(run, shards, tmp_path):
    code, out, _ = run("tokenize", "check", shards, "--out", tmp_path / "c.png")
    assert code == 0
    assert "100% of their codes are unchanged" in out


def test_other_weights_are_noticed(run, refused, made, tmp_path):
    """Guards against 100 epochs on wrong codes."""
    shards, weights = made
    state = vq_state()
    state["quantize.embedding.weight"][0, 0] += 1
    torch.save({"model": state}, tmp_path / "other.pt")
    assert "made with other weights" in refused("tokenize", "check", shards, "--weights", tmp_path / "other.pt")
    weights.rename(tmp_path / "moved.pt")
    words = ("tokenize", "check", shards, "--out", tmp_path / "c.png")
    assert "vq.pt are not there; add --weights FILE" in refused(*words)
    assert run(*words, "--weights", tmp_path / "moved.pt")[0] == 0


@pytest.mark.parametrize("damage", ["byte", "vocabulary", "grid"])
def test_damage_gives_exit_code_2(refused, made, tmp_path, damage):
    shards, _ = made
    tar, manifest = shards / "train-000000.tar", shards / "manifest.json"
    data = json.loads(manifest.read_text())
    if damage == "byte":
        raw = bytearray(tar.read_bytes())
        raw[700] ^= 1
        tar.write_bytes(raw)
    else:
        data |= {"vocabulary": {"vocabulary": 20}, "grid": {"grid": [2, 8]}}[damage]
    manifest.write_text(json.dumps(data))
    assert str(shards) in refused("tokenize", "check", shards)


def test_wrong_input_is_refused(refused, shards, tmp_path):
    assert "add --out" in refused("tokenize", "check", shards, "--decode", 3)
    assert "expected 1 or more" in refused("tokenize", "check", shards, "--decode", 0, "--out", tmp_path / "c.png")
    (tmp_path / "c.png").write_text("")
    assert "exists" in refused("tokenize", "check", shards, "--out", tmp_path / "c.png")
    assert "No shards" in refused("tokenize", "check", tmp_path)
    shutil.copytree(shards, tmp_path / "x")
    text = (tmp_path / "x" / "manifest.json").read_text()
    (tmp_path / "x" / "manifest.json").write_text(text.replace('"levels": 17', '"levels": 16'))
    assert "is not the one that made them" in refused("tokenize", "check", tmp_path / "x", "--out", tmp_path / "d.png")
