"""Intervals count optimiser steps, and a step is ranked by its own validation."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from training_toys import OptimiserConfig, fit, make_module


class Validations(Callback):
    """Logs a metric of its own, "quality", and keeps the values of one."""

    def __init__(self, monitor: str = "val/nll") -> None:
        self.monitor, self.seen = monitor, dict[int, float]()

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("quality", float(trainer.global_step))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen[trainer.global_step] = float(trainer.callback_metrics[self.monitor])


VALIDATING = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None, "enable_checkpointing": True}


def test_validations_count_steps_of_accumulated_batches(toy_shards: str, tmp_path: Path, caplog) -> None:
    """Six batches an epoch, steps of four: two batches are left, and were a step of their own."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    watch = Validations()
    options = {**VALIDATING, "enable_checkpointing": False}
    module = fit(
        tmp_path, toy_shards, make_module(), callbacks=[watch], accumulate_grad_batches=4, val_check_interval=2,
        max_steps=5, **options,
    )  # fmt: skip
    assert list(watch.seen) == [2, 4]
    assert "steps of 4 batches, and 2 batches at the end of an epoch are left out" in caplog.text
    assert (module.trainer.current_epoch, module.trainer.global_step) == (5, 5)
    assert (module.trainer.val_check_interval, module.trainer.limit_train_batches) == (2, 1.0)  # put back


def test_a_step_longer_than_an_epoch_is_refused(toy_shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches is 7, but an epoch has 6 batches; expected at most"):
        fit(tmp_path, toy_shards, make_module(), accumulate_grad_batches=7)


class OwnCheckpoint(ModelCheckpoint):
    """A class of the user's, which was not taken for one, and ranked steps by earlier validations."""


def ranked(tmp_path: Path, shards: str, kind=ModelCheckpoint, monitor="val/nll", every=4, accumulate=1, **saving):
    """Steps and values in the names of the checkpoints of eight steps; steps and values of the validations, one
    `every` so many; and the callback."""
    watch = Validations(monitor)
    save = kind(
        tmp_path, filename=f"{{step}}-{{{monitor}:.6f}}", auto_insert_metric_name=False, monitor=monitor, save_top_k=-1,
        **saving,
    )  # fmt: skip
    fit(
        tmp_path, shards, make_module(optimiser=OptimiserConfig(lr=0.1)), callbacks=[watch, save],
        val_check_interval=every, max_steps=8, accumulate_grad_batches=accumulate, **VALIDATING,
    )  # fmt: skip
    files = [re.fullmatch(r"(\d+)-(.*)\.ckpt", str(path.relative_to(tmp_path))) for path in tmp_path.rglob("*.ckpt")]
    assert len(files) == sum(map(bool, files)) + bool(save.save_last)
    return {int(found[1]): float(found[2]) for found in files if found}, watch.seen, save


@pytest.mark.parametrize(
    ("accumulate", "kind", "monitor"),
    [(1, ModelCheckpoint, "val/nll"), (2, OwnCheckpoint, "val/nll"), (1, ModelCheckpoint, "quality")],
)
def test_a_checkpoint_is_ranked_by_its_own_validation(
    toy_shards: str, tmp_path: Path, accumulate: int, kind: type[ModelCheckpoint], monitor: str, caplog
) -> None:
    """Saved every second step, validated every third: at steps 3 and 6, with their values; the last one at its own.

    A metric of another name than val/..., as a user's callback logs it, had the value of the validation before."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    options = {"every_n_train_steps": 2, "save_last": True}
    found, seen, save = ranked(tmp_path, toy_shards, kind, monitor, 3, accumulate, **options)
    assert found == {step: pytest.approx(seen[step], abs=1e-6) for step in (3, 6)}
    assert "left out" not in caplog.text, "six batches are whole steps"
    assert save.state_key.startswith(kind.__qualname__)


@pytest.mark.parametrize("monitor", ["val/nll", "quality"])
def test_the_end_of_an_epoch_is_not_ranked_by_an_earlier_validation(
    toy_shards: str, tmp_path: Path, monitor: str
) -> None:
    """Step 6, an epoch's last, had the value of step 4: `save_on_train_epoch_end` saves before it is validated."""
    found, seen, _ = ranked(tmp_path, toy_shards, monitor=monitor, every_n_epochs=1, save_on_train_epoch_end=True)
    assert found == {step: pytest.approx(seen[step], abs=1e-6) for step in (4, 8)}


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (ModelCheckpoint(monitor="train/loss", every_n_train_steps=2), "ranks every 2 steps by train/loss, which is "),
        (ModelCheckpoint(monitor="lr/head"), "ranks epochs or hours by lr/head, which is known of every 3"),
        (GradientAccumulationScheduler({0: 2}), "a GradientAccumulationScheduler; .*Set trainer.accumulate_grad"),
        (StochasticWeightAveraging(1e-2), "a StochasticWeightAveraging; .* set model.ema_decay"),
    ],
    ids=["ranked by the loss of an earlier step", "by the rate of one", "steps of two sizes", "other learning rates"],
)
def test_what_would_make_another_schedule_is_refused(toy_shards: str, tmp_path: Path, callback, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        fit(tmp_path, toy_shards, make_module(), callbacks=[callback], enable_checkpointing=True, log_every_n_steps=3)


class Epochs(Callback):
    def on_train_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("quality", float(trainer.global_step))


def test_a_metric_of_epochs_ranks_epochs(toy_shards: str, tmp_path: Path) -> None:
    """A validation between two of them makes it no metric of validations."""
    save = ModelCheckpoint(
        tmp_path, filename="{step}-{quality:.0f}", auto_insert_metric_name=False, monitor="quality", save_top_k=-1,
        save_on_train_epoch_end=True,
    )  # fmt: skip
    fit(tmp_path, toy_shards, callbacks=[Epochs(), save], val_check_interval=4, max_steps=8, **VALIDATING)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"6-6.ckpt", "8-8.ckpt"}
