"""The way to Table 1 in little: photographs, codes, post-training, metrics, a converted model, each command a process.

The parts have tests of their own; this one guards what passes between them: files, paths, labels, grids and names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_toys import tiny_backbone
from PIL import Image
from random_inception import save_random_inception
from tiny_images import vq_state

from flashar_pl.data.shards import Manifest

pytestmark = pytest.mark.slow

EACH = {"train": 20, "val": 6}
RUN = {
    "seed_everything": 0,
    "model": {
        "backbone": {
            "options": {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 64, "num_classes": 2}
        },
        "flashar": {"branch_layer": 1},
        "init_from": "c2i_tiny.pt",
        "validation": {"grid_images": 4, "cfg_scale": 2.0},
        "optimiser": {"lr": 0.003},
    },
    "data": {"shards": "shards", "batch_size": 8},
    "trainer": {
        "default_root_dir": "runs/tiny",
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "last", "every_n_train_steps": 5, "enable_version_counter": False},
            }
        ],
    },
}


def crop_photographs(root: Path) -> None:
    """Pieces of scikit-learn's two photographs as JPEGs, one folder for each, and 16 x 16 centres of those of val."""
    from sklearn.datasets import load_sample_image

    random = np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for split, count in EACH.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                left, top = random.integers(0, 500), random.integers(0, 300)
                width, height = random.integers(40, 120, 2)
                piece = photograph.crop((left, top, left + width, top + height))
                piece.save(root / split / name / f"{i:02d}.JPEG", quality=90)
                if split == "val":
                    (root / "reference").mkdir(exist_ok=True)
                    piece.resize((16, 16)).save(root / "reference" / f"{name}{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What a user has at the start: photographs, tokenizer, raster model and Inception weights."""
    root = tmp_path_factory.mktemp("chain")
    crop_photographs(root)
    torch.save({"model": vq_state()}, root / "vq.pt")
    official = tiny_backbone(vocab_size=64, num_classes=2).to_official()
    torch.save({"model": official}, root / "c2i_tiny.pt")
    save_random_inception(root / "inception.pth")
    (root / "tiny.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return root


def flashar(place: Path, line: str) -> str:
    """Run a command line in a process of its own; returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "flashar_pl.cli", *line.split()],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_from_photographs_to_a_table(place: Path) -> None:
    common = "--out shards --weights vq.pt --image-size 16 --ten-crop --workers 0 --block 4"
    assert "40 of 40 images" in flashar(place, f"tokenize imagenet --images train {common}")
    assert "12 of 12 images" in flashar(place, f"tokenize imagenet --images val --split validation {common}")
    flashar(place, "tokenize check shards --decode 4 --out check.png")
    manifest = Manifest.load(place / "shards")
    assert (manifest.grid, manifest.crops) == ((4, 4), 10)

    flashar(place, "fit --config tiny.yaml")
    last = "runs/tiny/checkpoints/last.ckpt"
    stored = torch.load(place / last, weights_only=True)["flashar"]
    assert (stored["training"]["step"], stored["training"]["stage"]) == (10, 2)
    assert sorted(p.name for p in (place / "runs/tiny/samples").iterdir()) == [
        "val_step_0000005.png", "val_step_0000010.png",
    ]  # fmt: skip

    measure = "--features inception.pth --num-samples 10 --min-samples 10 --cfg-scale 2 --batch-size 5 --device cpu"
    adapted = "--labels random --save-npz --reference reference --out eval/flashar"
    flashar(place, f"evaluate --checkpoint {last} {measure} {adapted}")
    raster = "--grid 4x4 --n-head 2 --tokenizer vq16:vq.pt --plan raster --reference shards --split validation"
    flashar(place, f"evaluate --checkpoint c2i_tiny.pt {measure} {raster} --out eval/raster")
    rows = {n: json.loads((place / "eval" / n / "evaluation.json").read_text()) for n in ("flashar", "raster")}
    for row in rows.values():
        assert {"fid", "sfid", "is", "precision", "recall"} <= row["metrics"].keys()
        assert np.isfinite(list(row["metrics"].values())).all()
        assert row["samples"]["image_size"] == [16, 16]
        assert row["reference"]["images"] == 12
    assert [rows[n]["samples"]["plan"] for n in rows] == ["diagonal", "raster"]
    identity = [row["samples"]["tokenizer"] for row in rows.values()]
    assert identity[0] == identity[1], "the checkpoint names the tokenizer its shards were made with"

    assert "2 runs" not in flashar(place, "plot runs/tiny --out curves.png")
    flashar(place, f"convert {last} --out model")
    flashar(place, "generate --checkpoint model --classes 0,1 --out samples --device cpu")
    assert (place / "curves.png").stat().st_size > 1000
    assert list((place / "samples").glob("*.png"))
