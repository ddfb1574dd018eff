"""A run that is asked to stop saves itself on all ranks, and continues as if it had never stopped."""

import signal
from pathlib import Path

import pytest
import torch
import yaml
from pair import Pair
from sharded_ranks import Ask, run, run_all
from training_toys import OPTIONS, make_data, make_module, make_trainer

from flashar_pl.checkpoints.sharded import read_meta
from flashar_pl.cli import main
from flashar_pl.training.preemption import StopOnSignal
from flashar_pl.training.sharded.strategy import ShardedStrategy


def test_saves_and_ends_with_its_own_exit_code(toy_shards: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    trainer = make_trainer(tmp_path, strategy=ShardedStrategy("fp32"), callbacks=[Ask(0), StopOnSignal()])
    with pytest.raises(SystemExit) as end:
        trainer.fit(make_module(), datamodule=make_data(toy_shards))
    assert end.value.code == 75
    meta = read_meta(tmp_path / "checkpoints" / "stopped.ckpt")
    assert meta["global_step"] == 3
    assert meta["flashar"]["training"]["step"] == 3
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(ValueError, match="expected signals"):
        StopOnSignal(("USR1",))


def test_the_command_ends_with_the_code_that_the_cluster_script_looks_for(toy_shards: str, tmp_path: Path) -> None:
    """Lightning marks such a run as interrupted, which the command otherwise takes for Ctrl-C (130)."""
    recipe = {
        "model": {"backbone": {"options": OPTIONS}, "flashar": {"branch_layer": 1}},
        "data": {"shards": toy_shards, "batch_size": 8},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "devices": 1, "max_steps": 5,
            "limit_val_batches": 0, "enable_progress_bar": False,
            "strategy": {"class_path": "flashar_pl.training.sharded.strategy.ShardedStrategy"},
            "callbacks": [
                {"class_path": "sharded_ranks.Ask", "init_args": {"rank": 0}},
                {"class_path": "flashar_pl.training.preemption.StopOnSignal"},
            ],
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 75
    assert read_meta(tmp_path / "run" / "checkpoints" / "stopped.ckpt")["global_step"] == 3


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both(pair: Pair, toy_shards: str, tmp_path: Path) -> None:
    job = {"root": str(tmp_path), "shards": toy_shards, "strategy": "sharded", "options": {"compute": "fp32"}}
    pair(run_all, [{**job, "name": "stopped", "signal": 1}])
    alone = run({**job, "name": "alone", "devices": 1})
    again = run({**job, "name": "again", "devices": 1, "ckpt": f"{tmp_path}/checkpoints/stopped.ckpt"})
    assert torch.load(tmp_path / "stopped.pt", weights_only=True)["code"] == 75
    assert list(again["losses"]) == list(range(4, 11))
    for step, loss in again["losses"].items():
        assert loss == pytest.approx(alone["losses"][step], abs=1e-5)
