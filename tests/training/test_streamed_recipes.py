"""The streamed recipes of experiments/, through the command line, on two ranks, with tiny models and tiny tars."""

import json
import os
from pathlib import Path
from typing import Any

import emu_files
import numpy as np
import pytest
import torch
import webdataset
import yaml
from emu_tiny_data import write as write_emu
from pair import Pair
from test_experiments import FOLDER
from tiny_images import vq_state

from flashar_pl.cli import main
from flashar_pl.data.shards import ConditionSpec, ShardWriter
from flashar_pl.training.stored_config import read_config

HERE = {"accelerator": "cpu", "devices": 2, "precision": "32-true", "max_steps": 6, "num_sanity_val_steps": 0}
DATA = {"images": "tars/{0..3}.tar", "epoch_samples": 16, "batch_size": 4, "num_workers": 1, "shuffle": 8}


def fit_all(place: str, runs: list[list[str]]) -> list[int]:
    """The command line `flashar fit` for each list of words, in one directory; exit codes."""
    before = os.getcwd()
    os.chdir(place)
    try:
        return [main(["fit", *words]) for words in runs]
    finally:
        os.chdir(before)


def write_tars(root: Path) -> None:
    """Four tars of six images, each with a class and a caption."""
    emu_files.write_images(root / "images", 24, 0, "list")
    items = json.loads((root / "images" / "list.json").read_text())
    (root / "tars").mkdir()
    for k in range(4):
        with webdataset.TarWriter(str(root / f"tars/{k}.tar"), encoder=False) as tar:
            for i in range(6 * k, 6 * k + 6):
                image = (root / "images" / items[i]["image"]).read_bytes()
                condition = {"cls": str(i % 3).encode(), "txt": items[i]["caption"].encode()}
                tar.write({"__key__": f"{i:02d}", "png": image} | condition)


def write_class_shards(root: Path) -> None:
    torch.save({"model": vq_state()}, root / "vq.pt")
    tokenizer, condition = {"kind": "vq16", "weights": "vq.pt"}, ConditionSpec("class", num_classes=3)
    with ShardWriter(
        root / "classes", name="x", tokenizer=tokenizer, grid=(4, 4), vocabulary=64, condition=condition
    ) as writer:
        writer.write("validation", np.zeros((4, 4, 4), dtype=np.int64), ids=range(4), labels=[0, 1, 2, 0])


def tiny(root: Path, recipe: str, model: dict[str, Any], data: dict[str, Any], **trainer: Any) -> list[str]:
    """Words of a run: the recipe as it is, and a second file with the sizes of this test."""
    small = {"model": model, "data": DATA | data, "trainer": HERE | trainer | {"default_root_dir": f"runs/{recipe}"}}
    (root / f"{recipe}.yaml").write_text(yaml.safe_dump(small))
    return ["--config", str(FOLDER / f"{recipe}.yaml"), "--config", f"{recipe}.yaml"]


@pytest.mark.slow
def test_streamed_recipes_on_two_ranks(pair: Pair, tmp_path: Path) -> None:
    """Guards ranks with different numbers of batches, which would wait for one another for ever."""
    write_tars(tmp_path)
    write_class_shards(tmp_path)
    write_emu(tmp_path / "emu")
    emu = yaml.safe_load((FOLDER / "emu35_tiny.yaml").read_text())["model"]
    sizes = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 64, "num_classes": 3}
    names = ["llamagen_b_256_streamed", "emu35_34b_streamed"]
    runs = [
        tiny(
            tmp_path, names[0],
            {
                "backbone": {"preset": None, "options": sizes},
                "flashar": {"branch_layer": 1},
                "init_from": None,
                "validation": {"grid_images": 2, "samples": 0, "features": None, "reference": None},
            },
            {"shards": "classes"},
            max_epochs=-1,
        ),
        tiny(
            tmp_path, names[1],
            {
                "backbone": emu["backbone"] | {"preset": None, "directory": None},
                "flashar": {"branch_layer": 1},
                "init_from": "emu/model",
                "validation": {"grid_images": 2, "sample_batch": 2},
            },
            {"shards": "emu/shards", "prompts": "emu/model"},
            val_check_interval=4,
        ),
    ]  # fmt: skip
    assert pair(fit_all, str(tmp_path), runs) == [[0, 0], [0, 0]]
    for name, kind in zip(names, ("ImageNetDataModule", "TextImageDataModule"), strict=True):
        stored = read_config(str(tmp_path / f"runs/{name}/checkpoints/last.ckpt"))["data"]
        assert stored["class_path"].endswith(kind)
        assert stored["init_args"]["reading"] == "streamed"
