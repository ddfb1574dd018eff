"""LoRA through the command line: two processes, official weights streamed into shards, export, samples."""

import re
from pathlib import Path

import pytest
import torch
from processes import RECIPE, flashar

from flashar_pl.checkpoints.sharded import SafeReader, read_sharded
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models.lora import ADDED

pytest.importorskip("tiktoken")
pytestmark = pytest.mark.slow
LORA = ("--model.lora.rank", 4, "--model.lora.alpha", 8, "--model.lora.base", "bf16")


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    """What the run printed; samples come one by one and the batch of a step is the recipe's, as on a single H200."""
    batch = ("--data.batch_size", 4, "--trainer.accumulate_grad_batches", 2)
    return flashar(folder, "fit", "--config", RECIPE, *LORA, *batch)


def test_learns_and_keeps_the_base(said: str, folder: Path) -> None:
    """Losses fall, the official weights stay bit for bit, and everything else moved."""
    stages = re.findall(r"Stage (\d) at step (\d+) of 20", said)
    assert list(dict.fromkeys(stages)) == [("1", "0"), ("2", "4")]
    losses = [float(x) for x in re.findall(r"val/nll ([\d.]+)", said)]
    assert losses[-1] < losses[0] - 10
    checkpoint = folder / "runs/emu35_tiny/checkpoints/step=20.ckpt"
    base = load_model(folder / "data/emu35_tiny/model").model.state_dict()
    names = [name for name in SafeReader(checkpoint).names() if name.startswith(("net.", "ema."))]
    assert not [name for name in names if name.startswith("ema.backbone.") and ADDED not in name]  # never averaged
    for prefix in ("net.", "ema."):
        wanted = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        for name, value in read_sharded(checkpoint, wanted).items():
            if name.startswith("backbone.") and ADDED not in name:
                assert value.dtype == torch.bfloat16
                assert torch.equal(value, base[name.replace(".base_layer.", ".")].bfloat16()), name
            else:
                assert value.dtype == torch.float32
                assert bool(value.any()) or name.endswith("hidden.bias"), name


def test_exports_and_draws(said: str, folder: Path) -> None:
    """Every command reads the checkpoint as a plain model."""
    checkpoint = "runs/emu35_tiny/checkpoints/step=20.ckpt"
    told = flashar(folder, "convert", checkpoint, "--out", "models/merged")
    assert "torch.float32" in told
    merged, stored = load_model(folder / "models/merged").model, load_model(folder / checkpoint).model
    assert merged.state_dict().keys() == stored.state_dict().keys()
    assert not [name for name in merged.state_dict() if ADDED in name or "base_layer" in name]
    for source in ("models/merged", checkpoint):
        flashar(
            folder, "generate", "--checkpoint", source, "--prompt", "a red square", "--codes-only", "--cfg-scale", 2,
            "--out", source.replace("/", "_"),
        )  # fmt: skip


def test_continues_on_one_process(said: str, folder: Path) -> None:
    """From the middle, with the options in the checkpoint."""
    checkpoint = "runs/emu35_tiny/checkpoints/step=10.ckpt"
    told = flashar(
        folder, "fit", "--ckpt_path", checkpoint, "--trainer.devices", 1, "--trainer.default_root_dir", "runs/again",
    )  # fmt: skip
    assert "Stage 2 at step 10 of 20: backbone (LoRA)," in told
    assert "69,969 parameters on 1 x cpu; 31,281 of them train" in told
    assert "torchao" not in told
    before = float(re.findall(r"step 10: val/nll ([\d.]+)", said)[-1])
    after = float(re.findall(r"step 20: val/nll ([\d.]+)", told)[-1])
    assert after < before  # exactly how much depends on the captions that this number of processes drops
