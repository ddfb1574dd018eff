"""experiments/emu35_tiny.yaml through the real command line: two processes, the switch of stages, samples, resume."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from emu_tiny_data import GRID
from lightning.pytorch import Callback
from processes import RECIPE, flashar
from sharded_ranks import whole
from training_toys import make_trainer

from flashar_pl.checkpoints.sharded import SafeReader, read_meta
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.commands.convert import ConvertOptions, convert
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.options import ModelOptions
from flashar_pl.training.config import BackboneConfig, FlashARConfig
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.sharded.strategy import ShardedStrategy

pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    """What the run of the recipe printed."""
    return flashar(folder, "fit", "--config", RECIPE)


@pytest.mark.slow
def test_the_recipe_runs_on_two_processes(said: str, folder: Path) -> None:
    """Weights streamed from the official directory into shards, two stages, guided samples, checkpoints of shards."""
    assert "parameters loaded" in said
    assert "cloned into the vertical branch" in said
    stages = re.findall(r"Stage (\d) at step (\d+) of 20", said)
    assert list(dict.fromkeys(stages)) == [("1", "0"), ("2", "4")]
    run = folder / "runs" / "emu35_tiny"
    assert len(list((run / "samples").glob("*.png"))) == 2
    for step in (10, 20):
        checkpoint = run / "checkpoints" / f"step={step}.ckpt"
        names = {".metadata", "meta.pt", "digests.json", "__0_0.distcp", "__1_0.distcp"}
        assert {file.name for file in checkpoint.iterdir()} == names
    assert read_meta(checkpoint)["flashar"]["training"]["stage"] == 2
    losses = [float(x) for x in re.findall(r"val/nll ([\d.]+)", said)]
    assert losses[-1] < losses[0] - 10


@pytest.mark.slow
def test_checkpoint_keeps_its_dtypes(said: str, folder: Path) -> None:
    """float32 master weights and averages, moments in the bfloat16 that the recipe asks for."""
    checkpoint = folder / "runs/emu35_tiny/checkpoints/step=20.ckpt"
    entries = SafeReader(checkpoint).read_metadata().state_dict_metadata
    dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith(("net.", "ema."))} == {torch.float32}
    moments = {dtype for name, dtype in dtypes.items() if name.endswith((".exp_avg", ".exp_avg_sq"))}
    assert moments == {torch.bfloat16}


@pytest.mark.slow
def test_converts_to_a_model(said: str, folder: Path) -> None:
    """Consolidated export of both weights; each is the joined shards."""
    checkpoint = "runs/emu35_tiny/checkpoints/step=20.ckpt"
    convert(ModelOptions(str(folder / checkpoint)), ConvertOptions(str(folder / "model")))
    converted = load_model(folder / "model").model.state_dict()
    for name, value in load_model(folder / checkpoint, "ema").model.state_dict().items():
        assert torch.equal(converted[name], value), name
    module = FlashARModule.load_from_checkpoint(folder / checkpoint)
    assert all(torch.equal(module.ema.state_dict()[name], value) for name, value in converted.items())


def first_steps(folder: Path, strategy: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of two steps from the official directory at one seed, and the gate's hidden weights before them."""
    torch.manual_seed(7)
    module = FlashARModule(
        backbone=BackboneConfig(directory=str(folder / "data/emu35_tiny/model"), options={"condition_dropout": 0.0}),
        flashar=FlashARConfig(branch_layer=1),
        init_from=str(folder / "data/emu35_tiny/model"),
    )
    data = CodesDataModule(
        str(folder / "data/emu35_tiny/shards"), batch_size=8, prompts=str(folder / "data/emu35_tiny/model")
    )
    start = Start()
    trainer = make_trainer(folder, max_steps=2, strategy=strategy, log_every_n_steps=1, callbacks=[start])
    trainer.fit(module, datamodule=data)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert start.gate is not None
    return start.losses, start.gate


class Start(Callback):
    """What a run starts from."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gate: torch.Tensor | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.gate is None:
            self.gate = whole(pl_module.net.dual_head.gate.hidden.weight.detach()).clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def test_streamed_weights_are_those_of_the_directory(folder: Path) -> None:
    """Rows that end up in the wrong shard, or a vertical branch cloned before its source was read, change the loss. The
    gate is in no file: drawn from where the generator stands, it would be another one in shards than in one process.
    """
    losses, gate = first_steps(folder, ShardedStrategy("fp32"))
    wanted, same = first_steps(folder, "auto")
    assert torch.equal(gate, same)
    assert losses == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_continues_on_one_process_and_generates(said: str, folder: Path) -> None:
    """From two processes to one in the middle, then to a picture."""
    options = ["--trainer.devices", 1, "--trainer.default_root_dir", "runs/again"]
    half_way = float(re.findall(r"step 10: val/nll ([\d.]+)", said)[-1])
    said = flashar(folder, "fit", "--ckpt_path", "runs/emu35_tiny/checkpoints/step=10.ckpt", *options)
    assert "Stage 2 at step 10 of 20" in said
    nll = float(re.findall(r"val/nll ([\d.]+)", said)[-1])
    words = ["--checkpoint", "runs/again/checkpoints/step=20.ckpt", "--out", "pictures", "--num-images", 1]
    grid = f"{GRID[0]}x{GRID[1]}"
    flashar(folder, "generate", *words, "--prompt", "nothing", "--grid", grid, "--cfg-scale", 5)
    assert (folder / "pictures" / "codes.npy").exists()
    assert nll < 0.8 * half_way
