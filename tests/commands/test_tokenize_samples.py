"""`flashar tokenize samples`: a model's own samples as shards, the data of post-training without images."""

import json
from dataclasses import replace

import numpy as np
import torch
import var_golden
from command_toys import tiny_backbone

from flashar_pl import decoding
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.models import RasterAR


def samples(folder: str) -> dict[int, tuple[int, np.ndarray]]:
    """Number of a training sample -> its class and codes."""
    manifest = Manifest.load(folder)
    read = ShardReader(manifest, "train").read(np.arange(manifest.samples("train")))
    return {int(i): (int(label), codes) for i, label, codes in zip(read.ids, read.labels, read.codes, strict=True)}


def test_sample_i_is_what_the_model_draws_from_seed_i(run, work, raster_model, refused):
    """Codes of another class or seed would train FlashAR on mislabelled images, silently."""
    words = ["tokenize", "samples", "--checkpoint", raster_model, "--classes", "7,2,9", "--num-images", 2, "--seed", 40]
    code, out, err = run(*words, "--batch-size", 1, "--shard-images", 4, "--out", "drawn")
    assert code == 0, err
    assert "6 of 6 images" in out
    found, model = samples("drawn"), load_model(raster_model).model
    assert sorted(label for label, _ in found.values()) == [2, 2, 7, 7, 9, 9]
    assert len({label for i, (label, _) in found.items() if i < 4}) > 1  # a part holds several classes
    for i in (0, 5):
        label, codes = found[i]
        expected = decoding.generate(model, torch.tensor([label]), (8, 8), "raster", seeds=[40 + i])
        assert (codes == expected[0].numpy()).all(), i
    assert run(*words, "--batch-size", 1, "--shard-images", 4, "--out", "drawn")[0] == 0  # complete already
    assert "cfg_scale" in refused(*words, "--batch-size", 1, "--shard-images", 4, "--out", "drawn", "--cfg-scale", 2)
    assert "grid" in refused(*words, "--batch-size", 1, "--shard-images", 4, "--out", "drawn", "--grid", "4x4")
    held_out = (*words[:-1], 45, "--batch-size", 4, "--split", "validation", "--out", "drawn")
    assert "have seeds 40 to 45, these 45 to 50; expected others for each split: --seed 46" in refused(*held_out)
    assert run(*held_out, "--seed", 46)[0] == 0
    assert Manifest.load("drawn").samples("validation") == 6
    settings = json.loads((work / "drawn/tokenize-train.json").read_text())["settings"]
    assert (settings["weights"], settings["weight_format"]) == ("converted model", "plain")
    assert settings["checkpoint_sha256"]


def test_splits_of_other_class_names_are_refused(run, work, refused):
    """Class 0 of the new split would be class 1 of the one that is there, under its name."""
    names, model = [f"n{i}" for i in range(10)], RasterAR(tiny_backbone())
    note = Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17})
    for folder, own in (("first", names), ("second", ["n1", "n0", *names[2:]])):
        save_model(work / folder, model, replace(note, training={"class_names": own}))
    words = ("tokenize", "samples", "--classes", "1", "--num-images", 1, "--out", "drawn", "--checkpoint")
    assert run(*words, "first")[0] == 0
    assert "has classes n0, this job makes n1; both splits" in refused(*words, "second", "--split", "test", "--seed", 1)
    assert Manifest.load("drawn").splits.keys() == {"train"}


def test_what_shards_cannot_hold_is_refused_before_anything_is_drawn(run, work, raster_model, refused):
    np.save("features.npy", np.zeros((2, 3), np.float32))
    words = ("tokenize", "samples", "--out", "drawn")
    assert "--prompts" in refused(*words, "--checkpoint", raster_model, "--text-features", "features.npy")
    assert "nothing to draw" in refused(*words, "--checkpoint", raster_model)
    assert "0 to 9" in refused(*words, "--checkpoint", raster_model, "--classes", "3,10")
    assert "auto" in refused(*words, "--checkpoint", raster_model, "--classes", "1", "--batch-size", "auto")
    assert "no checkpoint" in refused(*words, "--checkpoint", "absent.ckpt", "--classes", "1")
    for name in ("var_tiny", "vqvae_tiny"):
        torch.save(var_golden.read(name).state, f"{name}.pth")
    var = ("--checkpoint", "var_tiny.pth", "--tokenizer", "multi_scale_vq:vqvae_tiny.pth", "--classes", "1")
    assert "no grid" in refused(*words, *var)
    assert not (work / "drawn").exists()
