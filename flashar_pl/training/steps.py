"""Optimiser steps as callbacks see them: Lightning's hooks come after every batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """Calls `on_step` after the batch that completes an optimiser step, not where gradients are only accumulated."""

    step = -1
    """Completed optimiser steps when the last batch ended."""
    within_step = False
    """Whether the last batch only added its gradients."""

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimiser step `trainer.global_step` is complete; checkpoints of it are written after this."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.within_step = trainer.global_step, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.within_step, self.step = trainer.global_step == self.step, trainer.global_step
        if not self.within_step:
            self.on_step(trainer, pl_module)


def become(callback: Any, ours: type[Callback], theirs: type[Callback]) -> None:
    """Make a callback of Lightning's class `theirs`, or of a user's class below it, one of `ours` in place: whoever
    configured it keeps the object, and its state the name that earlier checkpoints have it under (`given`)."""
    kind = type(callback)
    if kind is theirs:
        callback.__class__ = ours
    elif issubclass(kind, theirs) and not issubclass(kind, ours):
        callback.__class__ = type(ours.__name__, (ours, kind), {"given": kind.__qualname__})


def is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends after the step that is ending."""
    return trainer.global_step >= trainer.estimated_stepping_batches


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that is ending, where it counts batches and not time."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or interval is None:
        return False
    if every is not None and (trainer.current_epoch + 1) % every:
        return False
    if trainer.should_stop or interval == float("inf"):
        return trainer.should_stop or trainer.is_last_batch
    batch = trainer.fit_loop.total_batch_idx if every is None else trainer.fit_loop.batch_idx
    return (batch + 1) % interval == 0


def logs(trainer: Trainer, step: int) -> bool:
    """Whether metrics of optimiser step `step`, counted from 1, reach the logger."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0
