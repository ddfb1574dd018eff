"""Work is saved when a run is stopped before its first checkpoint, and continues exactly."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from training_toys import fit, make_module

from flashar_pl.training.checkpoints import WholeFiles


class Stop(Callback):
    """Sends a signal, or fails, in a batch counted from 0, or in the validation after a step."""

    def __init__(
        self, what: signal.Signals | Exception, batch: int = -1, validation: int = -1, before: int = -1
    ) -> None:
        self.what, self.batch, self.validation, self.before = what, batch, validation, before

    def stop(self) -> None:
        if isinstance(self.what, Exception):
            raise self.what
        os.kill(os.getpid(), self.what)

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx == self.before:
            self.stop()

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.stop()

    def on_validation_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.validation:
            self.stop()


RUN = {
    "accumulate_grad_batches": 2, "max_steps": 5, "limit_val_batches": 1.0, "val_check_interval": 2,
    "check_val_every_n_epoch": None,
}  # fmt: skip


def run(root: Path, shards: str, *callbacks: Callback, start: Path | None = None):
    save = ModelCheckpoint(root, every_n_train_steps=1000)
    return fit(
        root, shards, make_module(ema_decay=0.5), start, callbacks=[*callbacks, save], enable_checkpointing=True, **RUN
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_shards: str):
    return run(tmp_path_factory.mktemp("whole"), toy_shards)


@pytest.mark.parametrize(
    ("stop", "end", "step"),
    [
        (Stop(signal.SIGINT, batch=5), SystemExit, 3),  # Lightning makes exit(1) of it, the command 130
        (Stop(signal.SIGTERM, batch=6), SystemExit, 4),
        (Stop(RuntimeError("out of memory"), batch=7), RuntimeError, 3),
        (Stop(signal.SIGTERM, validation=2), SystemExit, 2),
        (Stop(ValueError("a bad sample"), validation=4), ValueError, 4),
        (Stop(RuntimeError("out of memory"), before=6), RuntimeError, 3),  # its batch was counted: validations shifted
    ],
)
def test_a_stopped_run_continues_exactly(whole, toy_shards: str, tmp_path: Path, stop, end, step: int) -> None:
    """After the step where a signal came within one; from the last whole one after an error; before a validation."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(end) as ended:
            run(tmp_path, toy_shards, stop)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)  # Lightning ignores Ctrl-C from now on
    if stop.what == signal.SIGTERM:
        assert ended.value.code == 143
    stopped = tmp_path / "checkpoints" / "stopped.ckpt"
    assert torch.load(stopped, weights_only=True)["global_step"] == step
    continued = run(tmp_path, toy_shards, start=stopped)
    for (name, a), b in zip(whole.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    counts = [each.trainer.fit_loop.epoch_loop.batch_progress.total.ready for each in (whole, continued)]
    assert counts[0] == counts[1]


def test_a_stop_while_a_step_is_saved_saves_it(toy_shards: str, tmp_path: Path, monkeypatch) -> None:
    """The step was taken for saved, and the run went back to the checkpoint before. What may wait long here is the
    write of a large model, or with checkpoints in the background that of the one before."""
    write, stops = WholeFiles._write, [signal.SIGTERM]

    def stopped(self: WholeFiles, *what: Any) -> None:
        if stops:
            os.kill(os.getpid(), stops.pop())
        write(self, *what)

    monkeypatch.setattr(WholeFiles, "_write", stopped)
    with pytest.raises(SystemExit):
        fit(
            tmp_path, toy_shards, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2)], max_steps=5,
            enable_checkpointing=True,
        )  # fmt: skip
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert kept == {"stopped.ckpt": 2}
