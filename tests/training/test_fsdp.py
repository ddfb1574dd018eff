"""FSDP2 on gloo: two real processes against one, across the switch of stages, and checkpoints between them."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from pair import Pair
from sharded_ranks import FP32, SAMPLING, close, go, record, run, run_all
from training_toys import FlashARConfig, make_data, make_module, make_trainer

from flashar_pl.checkpoints.sharded import SafeReader, read_meta
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.tensor_files import is_sharded
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.strategies import check_checkpoint_kind


@pytest.fixture(scope="module")
def job(tmp_path_factory, toy_shards: str) -> dict[str, Any]:
    """What the fits of this file have in common: ten steps, the switch after two, clipping in every step."""
    return {"root": str(tmp_path_factory.mktemp("fsdp")), "shards": toy_shards, "ema": 0.5}


@pytest.fixture(scope="module")
def both(pair: Pair, job):
    """(single process, two sharded ranks, two DDP ranks, two ranks in bfloat16 with recomputed blocks)."""
    alone = run({**job, "name": "alone", "devices": 1, "strategy": "auto", "validation": SAMPLING, "gradients": True})
    sharded = {**job, "strategy": "sharded"}
    jobs = [
        {**sharded, "name": "sharded", "options": FP32, "save": 1, "validation": SAMPLING, "gradients": True},
        {**job, "name": "ddp", "strategy": "ddp", "gradients": True},
        {**sharded, "name": "bf16", "options": {"recompute": True}, "dtypes": True, "max_steps": 4},
    ]
    pair(run_all, jobs)
    return alone, *map(record, jobs)


def test_two_ranks_equal_one_process(both) -> None:
    """Gradients of units that were frozen, the global norm of the clipping, the averages: each off would show here."""
    alone, sharded, _, _ = both
    close(sharded, alone)


def test_gradients_equal_those_of_one_process(both) -> None:
    """Of every parameter before clipping, in the last step of stage 1 and in the first of stage 2."""
    alone, *others = both[:3]
    assert not any(name.startswith("2.backbone") for name in alone["gradients"])
    assert any(name.startswith("3.backbone") for name in alone["gradients"])
    for found in others:
        assert found["gradients"] == pytest.approx(alone["gradients"], rel=1e-3, abs=1e-6)


def test_sharded_and_ddp_have_equal_losses(both) -> None:
    """Same data, seed and initial weights: the first process makes them, and the others get theirs from it."""
    _, sharded, ddp, _ = both
    close(sharded, ddp)


def test_dtypes(both) -> None:
    """bfloat16 compute on float32 shards, gradients and moments. A unit frozen when FSDP2 first sees it would keep
    bfloat16 gradients; a gate inside the heads' unit would be gathered in bfloat16.
    """
    seen = both[3]["dtypes"]
    half, full = {"torch.bfloat16"}, {"torch.float32"}
    for what in ("block", "vertical block", "embedding", "norm", "heads", "activation"):
        assert seen[what] == half, what
    for what in ("gate", "gate value", "shard", "gradient", "moment"):
        assert seen[what] == full, what


def test_bfloat16_follows_float32(both) -> None:
    _, sharded, _, half = both
    assert half["losses"][1] == pytest.approx(sharded["losses"][1], abs=5e-3)


def test_validation_and_samples_on_two_ranks(both) -> None:
    """Ranks with nothing to draw must run every step too, or the others would wait for ever."""
    alone, sharded, _, _ = both
    for name in ("val/nll", "val/gate_mean"):
        assert sharded["results"][name] == pytest.approx(alone["results"][name], rel=1e-4)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_continues_on_one_device_from_either_side_of_the_switch(both, job, tmp_path: Path, step: int) -> None:
    """Stage 1 ends after step 2. Guards the moments of parameters that are frozen when a run continues, or were when
    it was saved."""
    checkpoint = Path(job["root"]) / f"step={step}.ckpt"
    assert is_sharded(checkpoint)
    here = {**job, "name": "here", "root": str(tmp_path), "devices": 1, "strategy": "sharded", "options": FP32}
    gone = str(tmp_path / "gone.pt")  # what the run once started from is not asked for again
    close(run({**here, "ckpt": str(checkpoint), "init_from": gone}), both[0], after=step)


def test_lost_moments_would_show(both, job, tmp_path: Path, monkeypatch) -> None:
    """The comparison above can fail: without the moments of step 5 the losses differ."""
    monkeypatch.setattr(ShardedStrategy, "_make_states", lambda *_: None)
    here = {**job, "name": "here", "root": str(tmp_path), "devices": 1, "strategy": "sharded", "options": FP32}
    found = run({**here, "ckpt": f"{job['root']}/step=5.ckpt"})
    assert abs(found["losses"][8] - both[0]["losses"][8]) > 1e-4


def test_checkpoint_is_a_model(both, job) -> None:
    """Averaged weights by default; the shards of two ranks joined."""
    checkpoint = f"{job['root']}/step=10.ckpt"
    weights = both[1]["weights"]
    again = FlashARModule.load_from_checkpoint(checkpoint)
    assert again.optimiser.lr == 1e-2
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    for choice, prefix in (("auto", "ema."), ("raw", "net.")):
        for name, value in load_model(checkpoint, choice).model.state_dict().items():
            assert torch.equal(value, weights[prefix + name]), name


def test_starts_from_a_file(both, job, toy_shards: str, tmp_path: Path) -> None:
    """A raster file into shards: the vertical branch is cloned after it is read, and nothing keeps the placeholder."""
    from flashar_pl.checkpoints.description import Description
    from flashar_pl.checkpoints.weights import save_model

    module = make_module(flashar=False)
    module.configure_model()
    torch.nn.init.normal_(module.net.backbone.head.weight, std=0.1)
    save_model(tmp_path / "raster", module.net, Description(module.net.config()))
    one = {**job, "root": str(tmp_path), "devices": 1, "init_from": str(tmp_path / "raster"), "max_steps": 2}
    sharded = run({**one, "name": "a", "strategy": "sharded", "options": FP32})
    close(sharded, run({**one, "name": "b", "strategy": "auto"}))


def test_half_written_checkpoint_keeps_the_old_one(both, job, toy_shards: str, tmp_path: Path, monkeypatch) -> None:
    """A crash while the same name is written again must leave the old directory as it was."""
    trainer = make_trainer(tmp_path, max_steps=1, strategy=ShardedStrategy("fp32"))
    trainer.fit(make_module(), datamodule=make_data(toy_shards))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    before = sorted((p.name, p.read_bytes()) for p in path.iterdir())

    def crash(tensors: Any, checkpoint_id: Path, **_: Any) -> None:
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("flashar_pl.checkpoints.sharded.dcp.save", crash)
    with pytest.raises(OSError):
        trainer.save_checkpoint(path)
    monkeypatch.undo()
    assert sorted((p.name, p.read_bytes()) for p in path.iterdir()) == before
    trainer.save_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith((".part", ".old"))] == []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("bomb-went-off"),)


def test_foreign_index_runs_no_code(both, job, tmp_path: Path, monkeypatch) -> None:
    """torch reads the index of a sharded checkpoint with a plain unpickler."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(f"{job['root']}/step=1.ckpt", "checkpoint")
    Path("checkpoint/.metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="read safely"):
        SafeReader("checkpoint").read_metadata()
    with pytest.raises(ValueError, match="read safely"):
        load_model("checkpoint")
    assert not Path("bomb-went-off").exists()
    assert read_meta("checkpoint")["flashar"]["training"]["step"] == 1


def test_wrong_settings_are_refused(both, job, toy_shards: str, tmp_path: Path) -> None:
    def fit(strategy: Any, **options: Any) -> None:
        trainer = make_trainer(tmp_path, max_steps=1, strategy=strategy, **options.pop("trainer", {}))
        trainer.fit(make_module(options.pop("flashar", True)), datamodule=make_data(toy_shards), **options)

    with pytest.raises(ValueError, match=r"precision is bf16-mixed .* expected 32-true"):
        fit(ShardedStrategy(), trainer={"precision": "bf16-mixed"})
    with pytest.raises(ValueError, match=r"replicas is 2, but there are 1 devices"):
        fit(ShardedStrategy(replicas=2))
    with pytest.raises(ValueError, match="compute is 'fp16'"):
        ShardedStrategy(compute="fp16")
    with pytest.raises(ValueError, match=r"is a sharded checkpoint; continue it with"):
        check_checkpoint_kind(f"{job['root']}/step=1.ckpt", SingleDeviceStrategy())
    torch.save({}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="is no sharded checkpoint"):
        fit(ShardedStrategy(), ckpt_path=str(tmp_path / "file.ckpt"))
    average = FlashARConfig(branch_layer=1, fusion="average")  # this model has no gate
    with pytest.raises(ValueError, match="names are only in one of them"):
        fit(ShardedStrategy(), ckpt_path=f"{job['root']}/step=1.ckpt", flashar=average)


@pytest.mark.slow
def test_two_to_one_to_two(pair: Pair, both, job, tmp_path: Path) -> None:
    """Shards of two ranks read by one, and its shards by two again: the same losses as without interruption."""
    root = str(tmp_path)
    middle = {**job, "name": "one", "root": root, "devices": 1, "strategy": "sharded", "options": FP32, "save": 1}
    run({**middle, "ckpt": f"{job['root']}/step=2.ckpt", "validation": SAMPLING})
    last = {**job, "name": "two", "root": root, "strategy": "sharded", "options": FP32, "ckpt": f"{root}/step=5.ckpt"}
    pair(run_all, [last])
    close(record(last), both[0], after=5)


@pytest.mark.slow
def test_hybrid_sharding(both, job, tmp_path: Path) -> None:
    """Two copies of two shards on four ranks, clipping in every step; resume, on the same mesh and on a flat one."""
    root = str(tmp_path)
    hybrid = {**job, "root": root, "strategy": "sharded", "options": {**FP32, "replicas": 2}}
    again = [
        {**hybrid, "name": "again", "ckpt": f"{root}/step=2.ckpt"},
        {**hybrid, "name": "flat", "options": FP32, "ckpt": f"{root}/step=1.ckpt"},
    ]
    go([{**hybrid, "name": "hybrid", "save": 1}, *again], devices=4)
    close(record({**hybrid, "name": "hybrid"}), both[0])
    close(record(again[0]), both[0], after=2)
    close(record(again[1]), both[0], after=1)


@pytest.mark.slow
def test_offload_and_recomputation(pair: Pair, both, job, tmp_path: Path) -> None:
    """Neither changes a number."""
    options = {**FP32, "offload": True, "recompute": True}
    here = {**job, "name": "off", "root": str(tmp_path), "strategy": "sharded", "options": options, "save": 2}
    again = {**here, "name": "again", "ckpt": f"{tmp_path}/step=2.ckpt", "save": 0}
    pair(run_all, [here, again])
    close(record(here), both[0])
    close(record(again), both[0], after=2)
