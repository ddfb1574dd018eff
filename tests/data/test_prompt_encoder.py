"""Captions of shards become prefixes of an Emu3.5 model: the right header, truncation, and a run from a YAML."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flashar_pl.backbones import Conditioning
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.cli import main
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.prompt_encoder import PromptEncoder
from flashar_pl.data.shards import ConditionSpec, ShardWriter

pytest.importorskip("tiktoken")

import emu_files

GRID = (2, 3)
TEMPLATE = "<|extra_203|>You are a helpful assistant for t2i task. USER: {} ASSISTANT: <|extra_100|>"


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    return emu_files.write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("shards") / "captions"
    writer = ShardWriter(
        out, name="captions", tokenizer={"kind": "none"}, grid=GRID, vocabulary=emu_files.CODES,
        condition=ConditionSpec("text"), block=4,
    )  # fmt: skip
    with writer:
        for split, n in (("train", 16), ("validation", 4)):
            codes = np.random.default_rng(0).integers(0, emu_files.CODES, (n, *GRID))
            writer.write(split, codes, ids=np.arange(n), texts=[f"{split} {'x' * i}" for i in range(n)])
    return str(out)


def test_the_prefix_is_the_template_and_the_header_of_the_shards_grid(assets, shards) -> None:
    """Height and width exchanged, or a fixed 32 x 32, would train on a wrong header without any error."""
    data = CodesDataModule(shards, batch_size=4, prompts=str(assets), num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    text = PromptEncoder(assets, GRID).text
    for ids, sample in zip(batch.condition, batch.index.tolist()):
        expected = TEMPLATE.format(f"train {'x' * sample}") + "<|image start|>2*3<|image token|>"
        assert text.decode(ids) == expected


def test_captions_of_several_grids_have_the_header_of_their_batch(assets, tmp_path) -> None:
    """In training and validation."""
    grids = ((2, 3), (3, 2))
    for grid in grids:
        with ShardWriter(
            tmp_path / f"{grid[0]}x{grid[1]}", name="captions", tokenizer={"kind": "none"}, grid=grid,
            vocabulary=emu_files.CODES, condition=ConditionSpec("text"), block=4,
        ) as writer:  # fmt: skip
            for split in ("train", "validation"):
                codes = np.full((4, *grid), split == "train", dtype=np.int64)
                writer.write(split, codes, ids=range(4), texts=["a"] * 4)
    data = CodesDataModule(str(tmp_path), batch_size=2, prompts=str(assets))
    data.setup("fit")
    text = PromptEncoder(assets, GRID).text
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        assert {tuple(batch.codes.shape[1:]) for batch in batches} == set(grids)
        for batch in batches:
            height, width = batch.codes.shape[1:]
            for ids in batch.condition:
                assert text.decode(ids).endswith(f"<|image start|>{height}*{width}<|image token|>")


def test_long_captions_lose_their_end_and_the_first_is_announced(assets) -> None:
    encoder = PromptEncoder(assets, GRID, max_length=90)
    assert encoder("a <|extra_204|> b").tolist() == encoder("a <|extra_204|> b").tolist()
    with pytest.warns(UserWarning, match=r"the limit is 90.*cut without a word"):
        first = encoder("long " * 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = encoder("other " * 30)
    header = len(encoder.header)
    assert [len(first), len(second), encoder.truncated] == [90 + header, 90 + header, 2]
    for ids in (first, second):
        assert encoder.text.decode(ids).endswith(" ASSISTANT: <|extra_100|><|image start|>2*3<|image token|>")


def test_wrong_settings(assets, shards) -> None:
    with pytest.raises(ValueError, match=r"max_prompt is 20; expected at least \d\d"):
        PromptEncoder(assets, GRID, max_length=20)
    with pytest.raises(ValueError, match="expected one of them"):
        CodesDataModule(shards, prompts=str(assets), text_encoder=len)
    with pytest.raises(ValueError, match="prompts: the directory"):
        CodesDataModule(shards).setup("fit")
    with pytest.raises(ValueError, match=r"emu3\.tiktoken"):
        CodesDataModule(shards, prompts="nowhere").setup("fit")
    data = CodesDataModule(shards, prompts=str(assets))
    data.check_model(emu_files.CODES, Conditioning("prompt", 600, first_visual=emu_files.OFFSET))
    with pytest.raises(ValueError, match=re.escape(f"from token id {emu_files.OFFSET} on, the model from 7")):
        data.check_model(emu_files.CODES, Conditioning("prompt", 600, first_visual=7))


def test_a_yaml_names_weights_and_assets_and_trains(tmp_path, shards, monkeypatch, capsys) -> None:
    """From a released directory to a FlashAR checkpoint that loads by its path, with caption dropout and guidance."""
    monkeypatch.chdir(tmp_path)
    base = emu_files.write_base(tmp_path / "Emu3.5-Image")
    config = {
        "model": {
            "backbone": {"directory": "Emu3.5-Image", "options": {"condition_dropout": 0.5}},
            "flashar": {"branch_layer": 1},
            "init_from": "Emu3.5-Image",
        },
        "data": {"shards": shards, "batch_size": 4, "prompts": "Emu3.5-Image", "max_prompt": 85},
        "trainer": {"default_root_dir": "run", "accelerator": "cpu", "max_steps": 2, "logger": False,
                    "enable_progress_bar": False, "callbacks": [{
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": {"dirpath": "run", "filename": "last", "every_n_train_steps": 2}}]},
    }  # fmt: skip
    Path("emu.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "emu.yaml"]) == 0
    model = load_model("run/last.ckpt").model
    assert model.backbone.config.heads == "visual"
    assert model.backbone.config.unconditional_prompt is not None
    words = ["--checkpoint", "run/last.ckpt", "--prompt", "x", "--num-images", "1", "--codes-only", "--cfg-scale", "2"]
    assert main(["generate", *words, "--out", "out"]) == 0, "the checkpoint knows grid and prompt assets"
    assert np.load("out/codes.npy").shape == (1, *GRID)
    capsys.readouterr()
    assert main(["score", "--checkpoint", "run/last.ckpt", "--data", shards, "--split", "train"]) == 0
    scored = json.loads(capsys.readouterr().out)["nll_nats_per_image"]
    stored = load_model("run/last.ckpt").description.training
    assert (stored["prompts"], stored["max_prompt"]) == ("Emu3.5-Image", 85)
    data = CodesDataModule(shards, prompts=str(base), max_prompt=85, validation_batch_size=16)
    batch = next(iter(data._evaluation("train")))
    with torch.no_grad():
        nll = load_model("run/last.ckpt").model.eval().loss(batch.codes, batch.condition)["nll"]
    assert scored == pytest.approx(float(nll.mean()), rel=1e-5), "captions are cut as in training"
    untrained = load_model(base).model.backbone
    moved = (model.backbone.embedding.weight - untrained.embedding.weight).abs().max()
    assert 0 < moved < 1e-3, "it starts from the released weights, and stage 2 trains them"
