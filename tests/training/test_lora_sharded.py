"""LoRA on FSDP2: frozen bfloat16 weights among float32 ones in one unit, on two gloo processes against one."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sharded_ranks
import torch
from pair import Pair
from sharded_ranks import FP32, SAMPLING, go, record, run, run_all
from training_toys import CLASSES, GRID, LEVELS, make_module

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.sharded import SafeReader
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.models.lora import ADDED

pytestmark = pytest.mark.slow  # `test_lora.py` has one rank
LORA = {"rank": 2, "alpha": 4.0}
close = partial(sharded_ranks.close, atol=5e-5)
"""AdamW divides the rounding errors of B's smallest gradients by themselves: up to 1.2e-5 in a weight was seen."""


def is_frozen(name: str) -> bool:
    """Of a name in a module's state dict."""
    return name.startswith(("net.backbone.", "ema.backbone.")) and ADDED not in name


@pytest.fixture(scope="module")
def job(tmp_path_factory, toy_shards: str) -> dict[str, Any]:
    """Ten steps, the switch after two, from weights that bfloat16 holds exactly: its rounding cannot show."""
    root = tmp_path_factory.mktemp("lora")
    module = make_module(flashar=False, dropout=False)
    torch.manual_seed(5)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2).copy_(parameter.bfloat16())
    save_model(root / "raster", module.net, Description(module.net.config()))
    return {"root": str(root), "shards": toy_shards, "ema": 0.5, "init_from": str(root / "raster"), "lora": LORA}


@pytest.fixture(scope="module")
def both(pair: Pair, job):
    """(float32 in one process, two sharded ranks with bfloat16 base, the same in bfloat16 with recomputed blocks, the
    same offloaded, as two copies, two DDP ranks).
    """
    alone = run({**job, "name": "alone", "devices": 1, "strategy": "auto", "validation": SAMPLING})
    half = {**job, "lora": {**LORA, "base": "bf16"}, "strategy": "sharded"}
    jobs = [
        {**half, "name": "sharded", "options": FP32, "save": 1, "validation": SAMPLING},
        {**half, "name": "bf16", "options": {"recompute": True}, "dtypes": True, "max_steps": 4, "state": "bf16"},
        {**half, "name": "offloaded", "options": {**FP32, "recompute": True, "offload": True}},
        {**half, "name": "copies", "options": {**FP32, "replicas": 2}},
        {**job, "name": "ddp", "strategy": "ddp"},
    ]
    pair(run_all, jobs)
    return alone, *map(record, jobs)


def test_two_ranks_equal_one_process(both) -> None:
    """Also the first values of the added matrices: drawn once, and handed out."""
    alone, sharded, _, *others = both
    for found in (sharded, *others):
        close(found, alone)
    assert sharded["results"]["val/nll"] == pytest.approx(alone["results"]["val/nll"], rel=1e-4)


def test_frozen_weights_stay(both, job) -> None:
    """Bit for bit, through stage 2 on two ranks; they are written once."""
    start = load_model(job["init_from"]).model.state_dict()
    moved = 0
    for name, value in both[1]["weights"].items():
        if is_frozen(name):
            plain = name.split(".", 1)[1].replace(".base_layer.", ".")
            assert torch.equal(value.float(), start[plain]), name
        else:
            moved += int("lora_B" in name and bool(value.any()))
    assert moved == 2 * 2 * 4  # net and ema, two blocks, four projections


def test_dtypes(both, job) -> None:
    """Half the bytes for what is frozen; float32 shards, gradients and averages for what trains; no moments else."""
    seen = both[2]["dtypes"]
    half, full = {"torch.bfloat16"}, {"torch.float32"}
    for what in ("block", "vertical block", "embedding", "norm", "heads", "activation"):
        assert seen[what] == half, what
    assert seen["gate"] == seen["gradient"] == full
    assert seen["shard"] == half | full
    entries = SafeReader(f"{job['root']}/step=10.ckpt").read_metadata().state_dict_metadata
    for name, entry in entries.items():
        assert entry.properties.dtype == (torch.bfloat16 if is_frozen(name) else torch.float32), name
        if name.endswith(".exp_avg"):
            assert not is_frozen(name.removeprefix("optimiser.")), name
    assert any("lora_A" in name and name.endswith(".exp_avg") for name in entries)


def test_bfloat16_follows_float32(both) -> None:
    _, sharded, half, *_ = both
    for step in (1, 2):  # it is a shorter run: from here on rates and stages differ
        assert half["losses"][step] == pytest.approx(sharded["losses"][step], abs=5e-3)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_continues_on_one_device_from_either_side_of_the_switch(both, job, tmp_path: Path, step: int) -> None:
    """With a base of another dtype: float32 holds every bfloat16 value."""
    here = {**job, "name": "here", "root": str(tmp_path), "devices": 1, "strategy": "sharded", "options": FP32}
    gone = str(tmp_path / "gone")  # what the run once started from is not asked for again
    close(run({**here, "ckpt": f"{job['root']}/step={step}.ckpt", "init_from": gone}), both[0], after=step)


def test_checkpoint_is_a_plain_model(both, job) -> None:
    """The shards of two ranks joined and merged."""
    loaded = load_model(f"{job['root']}/step=10.ckpt", "raw")
    assert loaded.description.lora is None
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    alone = {name: value for name, value in both[0]["weights"].items() if name.startswith("net.")}
    layer = "backbone.blocks.1.feed_forward.w2"
    a, b = (alone[f"net.{layer}.lora_{which}.default.weight"] for which in "AB")
    wanted = alone[f"net.{layer}.base_layer.weight"] + 2 * b @ a
    torch.testing.assert_close(loaded.model.state_dict()[f"{layer}.weight"], wanted, atol=2e-5, rtol=1e-4)
    codes = torch.arange(16).view(1, *GRID) % LEVELS
    assert bool(torch.isfinite(loaded.model(codes, torch.tensor([CLASSES - 1])).fused).all())


def test_averages_share_uneven_shards(job, tmp_path: Path) -> None:
    """16 rows on three ranks: FSDP2 pads the last shard, in the averaged model for itself. Its frozen part, which no
    checkpoint holds, must follow; NaN or old weights would show in the validation after a resume."""
    sizes = {"data": {"batch_size": 6, "validation_batch_size": 6}, "max_steps": 5}
    alone = run({**job, **sizes, "root": str(tmp_path), "devices": 1, "strategy": "auto", "validation": SAMPLING})
    three = {**job, **sizes, "root": str(tmp_path), "strategy": "sharded", "options": FP32, "validation": SAMPLING}
    again = {"name": "again", "ckpt": str(tmp_path / "step=2.ckpt")}
    go([{**three, "name": "first", "save": 2}, {**three, **again}], devices=3)
    close(record({**three, "name": "first"}), alone)
    found = record({**three, **again})
    close(found, alone, after=2)
    assert found["results"]["val/nll"] == pytest.approx(alone["results"]["val/nll"], rel=1e-4)
