"""`flashar fit` with another data module than shards of codes: tars of images, tokenised during training."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from lightning.pytorch import LightningDataModule
from PIL import Image
from tiny_images import vq_state

from flashar_pl.commands.plot import read_scalars
from flashar_pl.data.shards import ConditionSpec, ShardWriter
from flashar_pl.training.stored_config import read_config

TARS = "flashar_pl.data.ImageNetDataModule"
RUN = {
    "model": {"backbone": {"options": {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 64,
                                       "num_classes": 3}}},
    "data": {
        "class_path": "ImageNetDataModule",
        "init_args": {"images": "tars", "shards": "shards", "reading": "streamed", "epoch_samples": 8, "batch_size": 4,
                      "num_workers": 0},
    },
    "trainer": {
        "default_root_dir": "run",
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 1,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "last", "every_n_train_steps": 2, "enable_version_counter": False},
            }
        ],
    },
}  # fmt: skip
LAST = "run/checkpoints/last.ckpt"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A directory with tars of JPEGs, shards for validation and run.yaml, as the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vq_state()}, "vq.pt")
    Path("tars").mkdir()
    random = np.random.default_rng(0)
    for k in range(2):
        with webdataset.TarWriter(f"tars/{k}.tar", encoder=False) as tar:
            for i in range(6):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, format="JPEG")
                tar.write({"__key__": f"{k}{i}", "jpg": buffer.getvalue(), "cls": str(i % 3).encode()})
    tokenizer, condition = {"kind": "vq16", "weights": "vq.pt"}, ConditionSpec("class", num_classes=3)
    with ShardWriter(
        "shards", name="x", tokenizer=tokenizer, grid=(4, 4), vocabulary=64, condition=condition
    ) as writer:
        for split in ("train", "validation"):
            writer.write(split, random.integers(0, 64, (6, 4, 4)), ids=range(6), labels=[0, 1, 2] * 2)
    Path("run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return tmp_path


def test_tars_of_images_from_a_yaml_and_back_from_the_checkpoint(run, work, monkeypatch):
    """Guards a resumed run that would fall back to shards of codes, and options that only one form knows."""
    assert run("fit", "--config", "run.yaml", "--data.init_args.seed", 3)[0] == 0
    stored = read_config(LAST)["data"]
    assert stored["class_path"] == TARS
    assert (stored["init_args"]["seed"], stored["init_args"]["images"]) == (3, "tars")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"] == stored

    said: list[str] = []
    monkeypatch.setattr("flashar_pl.training.lightning_cli.rank_zero_info", said.append)
    assert run("fit", "--ckpt_path", LAST, "--trainer.max_steps", 4, "--data.shuffle", 9)[0] == 0
    changes = [line.strip() for line in said if " -> " in line]
    assert changes == ["data.init_args.shuffle: 2000 -> 9", "trainer.max_steps: 2 -> 4"]
    assert torch.load(LAST, weights_only=True)["global_step"] == 4

    shards = ("--data.class_path=CodesDataModule", "--data.shards", "shards", "--data.batch_size", 6)
    assert run("fit", "--ckpt_path", LAST, "--trainer.max_steps", 6, *shards)[0] == 0
    stored = read_config(LAST)["data"]
    assert (stored["shards"], stored["batch_size"]) == ("shards", 6), "nothing of the other class stays"


def test_wrong_data_modules_and_keys_are_named(refused, work):
    base = ("fit", "--config", "run.yaml")
    message = refused(*base, "--data.image", "x")
    assert "no configuration key 'data.image'; closest: data.images" in message
    message = refused(*base, "--data.init_args.epoch_samples", "many")
    assert "data.epoch_samples is 'many'; expected int or null" in message
    message = refused(*base, "--trainer.strategy.init_args.background", "true")  # of the docs, without its class
    assert (
        "trainer.strategy is 'auto', which has no options; expected the import path of a class, such as fl" in message
    )
    assert "looked for none/manifest.json" in refused(*base, "--data.shards", "none")
    assert "none.tar" in refused(*base, "--data.images", "none.tar")
    for path in ("ImageTars", "json.JSONDecoder", "no.such.Module"):
        message = refused(*base, "--data.class_path", path)
        assert f"data.class_path is '{path}'" in message
        assert "expected one of CodesDataModule, ImageNetDataModule" in message
    mixed = {**RUN, "data": RUN["data"] | {"seed": 1}}
    Path("mixed.yaml").write_text(yaml.safe_dump(mixed), encoding="utf-8")
    assert "data has seed beside class_path" in refused("fit", "--config", "mixed.yaml")
    assert not Path("run").exists()


def test_a_data_module_of_ones_own(run, work, monkeypatch):
    """Guards the full path of a class, with its own arguments."""
    Path("own_data.py").write_text(
        "from flashar_pl.data.datamodules import CodesDataModule\n"
        "class OwnData(CodesDataModule):\n"
        "    def __init__(self, place: str) -> None:\n"
        "        super().__init__(place, batch_size=3)\n"
    )
    monkeypatch.syspath_prepend(str(work))
    config = {**RUN, "data": {"class_path": "own_data.OwnData", "init_args": {"place": "shards"}}}
    Path("own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert run("fit", "--config", "own.yaml")[0] == 0
    assert read_config(LAST)["data"] == config["data"]
    assert issubclass(sys.modules.pop("own_data").OwnData, LightningDataModule)


@pytest.mark.slow
def test_several_grids_on_one_and_two_devices(work):
    """Guards ranks on different grids at once, which would wait for each other forever, and other samples on two."""
    write_grid("grids/4x4", (4, 4), 24, 5)
    write_grid("grids/2x6", (2, 6), 16, 3)
    options = RUN["model"]["backbone"]["options"]
    none = {f"{name}_dropout": 0.0 for name in ("token", "resid", "ffn", "condition")}
    config = json.loads(json.dumps(RUN))
    config["model"] = {
        "backbone": {"options": options | none},
        "flashar": {"branch_layer": 1},
        "optimiser": {"lr": 0.01},
    }
    config["data"] = {"shards": "grids", "batch_size": 4, "validation_batch_size": 2, "num_workers": 1}
    config["trainer"] |= {"max_steps": 20, "limit_val_batches": 1.0}
    steps = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 5}
    config["trainer"]["callbacks"][0]["init_args"] = steps
    Path("run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def fit(out: str, devices: int, *words: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        where = ("--trainer.default_root_dir", out, "--trainer.devices", str(devices))
        command = [sys.executable, "-m", "flashar_pl.cli", "fit", *words, *where]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        state = torch.load(f"{out}/checkpoints/step=20.ckpt", weights_only=True)["state_dict"]
        return state, read_scalars(Path(out))["val/nll"][1]

    one, curve = fit("one", 1, "--config", "run.yaml")
    two, two_curve = fit("two", 2, "--config", "run.yaml")
    again, _ = fit("again", 1, "--ckpt_path", "two/checkpoints/step=5.ckpt")
    assert two_curve == pytest.approx(curve, rel=1e-5)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=0)


def write_grid(out: str, grid: tuple[int, int], train: int, validation: int) -> None:
    random = np.random.default_rng(grid[0])
    tokenizer, condition = {"kind": "pixels", "levels": 64}, ConditionSpec("class", num_classes=3)
    with ShardWriter(
        out, name="x", tokenizer=tokenizer, grid=grid, vocabulary=64, condition=condition, block=4
    ) as writer:
        for split, n in (("train", train), ("validation", validation)):
            writer.write(split, random.integers(0, 64, (n, *grid)), ids=range(n), labels=np.arange(n) % 3)


def test_several_grids_from_a_yaml(run, work, tmp_path):
    """The directory of grids as `shards`: trained on all, validated on all, resumed in the middle, scored one by one.

    Guards a validation that would sum over the first grid only, or divide by the wrong number of images.
    """
    write_grid("grids/4x4", (4, 4), 16, 5)
    write_grid("grids/2x6", (2, 6), 12, 3)
    config = json.loads(json.dumps(RUN))
    config["model"] |= {"flashar": {"branch_layer": 1}, "validation": {"grid_images": 2}, "optimiser": {"lr": 0.01}}
    config["data"] = {"shards": "grids", "batch_size": 4, "validation_batch_size": 2}
    config["trainer"] |= {"default_root_dir": "whole", "max_steps": 14, "limit_val_batches": 1.0}
    keep_all = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1}
    config["trainer"]["callbacks"][0]["init_args"] = keep_all
    Path("grids.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert run("fit", "--config", "grids.yaml")[0] == 0
    last = "checkpoints/step=14.ckpt"
    whole = torch.load(f"whole/{last}", weights_only=True)
    assert whole["flashar"]["grid"] == [4, 4]
    assert whole["flashar"]["training"]["grids"] == [[4, 4], [2, 6]]

    scores = {}
    for grid in ("4x4", "2x6"):
        code, out, _ = run("score", "--checkpoint", f"whole/{last}", "--data", f"grids/{grid}",
                           "--split", "validation", "--device", "cpu")  # fmt: skip
        assert code == 0
        scores[grid] = json.loads(out)["nll_nats_per_image"]
    expected = (5 * scores["4x4"] + 3 * scores["2x6"]) / 8
    curves = read_scalars(Path("whole"))
    assert curves["val/nll"][1][-1] == pytest.approx(expected, rel=1e-5)
    assert len(list(Path("whole/samples").glob("*.png"))) == 2

    resumed = ("--ckpt_path", "whole/checkpoints/step=3.ckpt", "--trainer.default_root_dir", "part")
    assert run("fit", *resumed)[0] == 0
    part = torch.load(f"part/{last}", weights_only=True)["state_dict"]
    assert all(torch.equal(value, part[name]) for name, value in whole["state_dict"].items())
