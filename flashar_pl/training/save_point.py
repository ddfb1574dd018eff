"""How far a run is, as its checkpoints say it: whole optimiser steps, and the validation that is still to come.

Lightning's loops are between two places while a batch or a validation is under way, and its checkpoints then lack what
was done since the last whole step, or skip the validation. A note is taken at the end of every step instead, and it is
what a checkpoint holds that is saved before the next one is over. Weights and moments change only at that end.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from flashar_pl.training.steps import StepCallback, validation_follows


class SavePoint(StepCallback):
    """Puts the progress of the last whole step into every checkpoint."""

    in_step = False
    """Whether a batch has started since the last whole step."""
    in_update = False
    """Whether weights are changing: after the gradients of a step, before its end."""
    in_validation = False
    noted: Progress | None = None
    """At the end of the last step or validation; None = no step was made."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.in_step, self.in_update, self.in_validation, self.noted = False, False, False, None
        epochs: Any = trainer.fit_loop.epoch_progress
        if trainer.fit_loop.restarted_mid_epoch and epochs.current.processed == epochs.current.ready:
            # the checkpoint was of an epoch's last batch: Lightning has ended that epoch, and would not count the next
            epochs.increment_ready()
            epochs.increment_started()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.in_step = True

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_step, self.in_update, self.noted = False, False, Progress(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_validation = True
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()  # one was counted, not done

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_validation = False
        if self.noted is not None and not self.in_step:
            self.noted = Progress(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total  # one is counted before its start is told
        between = not self.in_step and not self.in_validation and batches.ready == batches.processed
        if (state := Progress(trainer) if between else self.noted) is not None:
            checkpoint["loops"]["fit_loop"] = state.loop
            checkpoint.update(state.place)


class Progress:
    """What a checkpoint says of the loops and of the place in the data.

    Where a step has just ended and a validation follows, the loops are said to stand at its first batch: a run that
    continues there begins with it. Otherwise Lightning takes it for done.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.loop: dict[str, Any] = trainer.fit_loop.state_dict()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        place = None if data is None else data.state_dict()
        self.place = {type(data).__qualname__: place} if place else {}
        batches = self.loop["epoch_loop.batch_progress"]
        ended = batches["total"]["completed"] == batches["total"]["processed"] - 1  # in on_train_batch_end
        if not ended or not validation_follows(trainer):
            return
        for count in (batches["total"], batches["current"]):
            count["completed"] = count["processed"]
        seen = self.loop["epoch_loop.val_loop.batch_progress"]
        for count, done in ((seen["total"], seen["total"]["completed"]), (seen["current"], 0)):
            count.update(ready=done + 1, started=done + 1, processed=done, completed=done)
