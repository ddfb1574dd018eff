"""An interrupted run equals one that was never interrupted, bit for bit, dropout included."""

import errno
import random
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from training_toys import STEPS, Losses, OptimiserConfig, fit, make_module

from flashar_pl import files
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.training.preemption import Signals, StopOnSignal
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.sharded.units import local


def optimiser_state(module) -> dict:
    return module.trainer.optimizers[0].state_dict()["state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_shards: str):
    """The uninterrupted run, with a checkpoint after every step; it validates on the way."""
    root = tmp_path_factory.mktemp("whole")
    losses = Losses()
    save = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit(
        root, toy_shards, make_module(ema_decay=0.9), enable_checkpointing=True, callbacks=[losses, save],
        limit_val_batches=1.0, val_check_interval=3, check_val_every_n_epoch=None,
    )  # fmt: skip
    return root, module, losses.seen


@pytest.mark.parametrize("step", [1, 2, 3, 6, 8])
def test_continued_equals_uninterrupted(whole, toy_shards: str, tmp_path: Path, step: int) -> None:
    """Stage 1 ends after step 2, the first epoch after step 6. Guards the moments of parameters that were frozen when
    the checkpoint was written, the generators behind dropout, the schedule's length, the data cursor and the averages.
    """
    root, module, seen = whole
    losses = Losses()
    continued = fit(
        tmp_path, toy_shards, make_module(ema_decay=0.9), ckpt_path=root / f"step={step}.ckpt", callbacks=[losses],
        limit_val_batches=1.0, val_check_interval=3, check_val_every_n_epoch=None,
    )  # fmt: skip
    assert losses.seen == {s: seen[s] for s in range(step + 1, STEPS + 1)}
    for (name, a), b in zip(module.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states, others = optimiser_state(module), optimiser_state(continued)
    assert states.keys() == others.keys()
    for key, state in states.items():
        assert all(torch.equal(state[name], others[key][name]) for name in state)


def test_dropout_is_part_of_the_comparison(whole, toy_shards: str, tmp_path: Path) -> None:
    """Without the stored generators the continued run differs: otherwise the test above would prove nothing."""
    root, _, seen = whole
    checkpoint = torch.load(root / "step=3.ckpt", weights_only=True)
    del checkpoint["callbacks"]["RandomState"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    losses = Losses()
    fit(tmp_path, toy_shards, make_module(ema_decay=0.9), ckpt_path=tmp_path / "without.ckpt", callbacks=[losses])
    assert losses.seen[4] != seen[4]


def test_the_run_keeps_its_length(whole, toy_shards: str, tmp_path: Path, capsys) -> None:
    """A resumed run with another max_steps must not stretch the cosine or move the switch."""
    root, _, seen = whole
    losses = Losses()
    module = make_module(ema_decay=0.9)
    fit(tmp_path, toy_shards, module, ckpt_path=root / "step=1.ckpt", callbacks=[losses], max_steps=5)
    assert module.total_steps == STEPS
    assert losses.seen == {s: seen[s] for s in (2, 3, 4, 5)}


def test_the_end_of_a_run_is_saved(whole, toy_shards: str, tmp_path: Path) -> None:
    """Five steps with a checkpoint every two: the last one holds step 5, and a run continues from there exactly. No
    second file is written when a finished run is started again."""
    root, module, seen = whole
    save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2, enable_version_counter=False)
    fit(
        tmp_path, toy_shards, make_module(ema_decay=0.9), ckpt_path=root / "step=1.ckpt", callbacks=[save], max_steps=5,
        enable_checkpointing=True,
    )  # fmt: skip
    losses = Losses()
    continued = fit(
        tmp_path, toy_shards, make_module(ema_decay=0.9), ckpt_path=tmp_path / "last.ckpt", callbacks=[losses]
    )
    assert losses.seen == {s: seen[s] for s in range(6, STEPS + 1)}
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), continued.parameters(), strict=True))
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    options = {"enable_checkpointing": True, "callbacks": [save], "max_steps": 5}
    fit(tmp_path, toy_shards, make_module(ema_decay=0.9), ckpt_path=tmp_path / "last.ckpt", **options)
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == written


def test_a_checkpoint_replaces_the_old_one_when_it_is_whole(
    toy_shards: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Lightning goes through the temporary directory; from another file system it then copies over the old file."""
    runs, path = tmp_path / "runs", tmp_path / "runs" / "last.ckpt"
    save = {"enable_checkpointing": True, "data": {"batch_size": 24}}

    def last() -> ModelCheckpoint:
        return ModelCheckpoint(runs, filename="last", every_n_train_steps=1, enable_version_counter=False)

    fit(tmp_path, toy_shards, make_module(), max_steps=1, callbacks=[last()], **save)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    plain_save = torch.save

    def full(content, file) -> None:
        assert torch.load(path, weights_only=True)["global_step"] == 1
        plain_save(content, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(files, "WAITS", ())
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, toy_shards, make_module(), max_steps=2, callbacks=[last()], **save)
    assert [file.name for file in runs.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["global_step"] == 1

    tries = iter([True, True])

    def full_twice(content, file) -> None:
        plain_save(content, file)
        if next(tries, False):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full_twice)
    monkeypatch.setattr(files, "WAITS", (0, 0))
    fit(tmp_path, toy_shards, make_module(), max_steps=2, callbacks=[last()], **save)
    assert capsys.readouterr().err.count(f"No space left on device: '{path}'; trying again in 0 s.") == 2
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_a_run_that_is_asked_to_stop_saves_the_whole_step(whole, toy_shards: str, tmp_path: Path) -> None:
    """Callbacks of a YAML come before the module's: the averages of the step were not in the file."""
    stop = StopOnSignal()

    class Ask(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            stop.asked = trainer.global_step == 2

    with pytest.raises(SystemExit):
        fit(tmp_path, toy_shards, make_module(ema_decay=0.9), callbacks=[stop, Ask()])
    stopped, kept = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "checkpoints" / "stopped.ckpt", whole[0] / "step=3.ckpt")
    )
    assert all(torch.equal(value, kept[name]) for name, value in stopped.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_averaging_may_begin_and_end_on_resume(toy_shards: str, tmp_path: Path, sharded: bool) -> None:
    """It was an error of load_state_dict. Averages that are missing start at the weights."""

    def run(ema_decay: float | None, steps: int, start: Path | None = None):
        options = {"strategy": ShardedStrategy("fp32")} if sharded else {}
        return fit(tmp_path, toy_shards, make_module(ema_decay=ema_decay), ckpt_path=start, max_steps=steps, **options)

    for first, second in ((None, 0.5), (0.5, None)):
        path = tmp_path / f"{first}.ckpt"
        before = run(first, 4)
        before.trainer.save_checkpoint(path)
        after = run(second, 5, path)
        start, now = before.net.state_dict(), after.net.state_dict()
        assert (after.ema is None) == (second is None)
        if after.ema is not None:
            for name, value in after.ema.state_dict().items():
                torch.testing.assert_close(local(value), (local(start[name]) + local(now[name])) / 2, msg=name)


def test_averages_do_not_change_the_run(whole, toy_shards: str, tmp_path: Path) -> None:
    """A second model must draw no random numbers of the training."""
    _, _, seen = whole
    losses = Losses()
    fit(tmp_path, toy_shards, make_module(), callbacks=[losses])
    assert losses.seen == seen


def test_settings_of_the_optimiser_may_change(whole, toy_shards: str, tmp_path: Path) -> None:
    """The groups of a checkpoint bring their old values along, and the new ones would be ignored without a word."""
    root, _, _ = whole
    module = make_module(ema_decay=0.9, optimiser=OptimiserConfig(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.5))
    fit(tmp_path, toy_shards, module, ckpt_path=root / "step=3.ckpt", max_steps=4)
    for group in module.trainer.optimizers[0].param_groups:
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["weight_decay"] == (0.5 if group["params"][0].ndim >= 2 else 0), group["role"]


def test_more_epochs_are_said_to_be_idle(toy_shards: str, tmp_path: Path, caplog) -> None:
    """A run of epochs that is continued for longer trains with a rate of 0; only max_steps was compared."""
    save = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    options = {"max_steps": -1, "enable_checkpointing": True}
    fit(tmp_path, toy_shards, make_module(), callbacks=[save], max_epochs=1, **options)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = fit(tmp_path, toy_shards, make_module(), ckpt_path=tmp_path / "one.ckpt", max_epochs=2, max_steps=-1)
    assert "started for 6 steps" in caplog.text
    assert "stops at 12; the learning rate is 0 from there on" in caplog.text
    assert (module.total_steps, module.trainer.global_step) == (6, 12)


def test_checkpoint_is_plain_and_loads_as_a_model(whole) -> None:
    """weights_only=True, everything needed to rebuild the model, and the averaged weights by default."""
    root, module, _ = whole
    path = root / f"step={STEPS}.ckpt"
    content = torch.load(path, weights_only=True)["flashar"]
    assert content["grid"] == [4, 4]
    assert content["tokenizer"] == {"kind": "pixels", "levels": 8}
    assert (content["training"]["step"], content["training"]["total_steps"]) == (STEPS, STEPS)
    assert content["training"]["stage"] == 2
    for weights, net in (("auto", module.ema), ("ema", module.ema), ("raw", module.net)):
        loaded = load_model(path, weights).model
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))


def test_averages_are_written_with_the_step_they_belong_to(whole) -> None:
    """A checkpoint must hold the average after its own step: ModelCheckpoint has to come behind the update."""
    root, _, _ = whole
    ema = None
    for step in range(1, STEPS + 1):
        state = torch.load(root / f"step={step}.ckpt", weights_only=True)["state_dict"]
        net = state["net.backbone.blocks.1.ffn_norm.weight"]
        if ema is not None:
            ema = torch.lerp(ema, net, 1 - 0.9)
            assert torch.equal(ema, state["ema.backbone.blocks.1.ffn_norm.weight"]), step
        ema = state["ema.backbone.blocks.1.ffn_norm.weight"]


class Gambler(Callback):
    """A validation that draws random numbers of every kind."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        torch.rand(3), np.random.rand(3), random.random()


def test_validation_does_not_disturb_training(whole, toy_shards: str, tmp_path: Path) -> None:
    """The same losses whether and how validation draws random numbers: training gets its own back."""
    _, _, seen = whole
    often = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    for callbacks, validating in (([], {}), ([Gambler()], {**often, "num_sanity_val_steps": 1})):
        losses = Losses()
        fit(tmp_path, toy_shards, make_module(ema_decay=0.9), callbacks=[losses, *callbacks], **validating)
        assert losses.seen == seen


def test_handlers_that_lightning_has_put_back_stay() -> None:
    """After a fit SIGTERM went to Lightning's handler for good, which only takes a note of it."""
    before, signals = signal.getsignal(signal.SIGTERM), Signals()
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)  # Lightning's
        signals.watch(["SIGTERM"], print)
        signal.signal(signal.SIGTERM, before)
        signals.restore()
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)
