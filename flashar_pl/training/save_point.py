"""How far a run is, as its checkpoints say it: whole optimiser steps, and the validation that is still to come.

Lightning's loops are between two places while a batch or a validation is under way, and its checkpoints then lack what
was done since the last whole step, or skip the validation. A note is taken at the end of every step instead, and it is
what a checkpoint holds that is saved before the next one is over. Weights and moments change only at that end.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from flashar_pl.training.steps import StepCallback, validation_follows

LOOPS = "loops"
"""Key of the loops' progress in a checkpoint."""


class SavePoint(StepCallback):
    """Puts the progress of the last whole step into every checkpoint."""

    in_step = False
    """Whether a batch has started since the last whole step."""
    in_validation = False
    noted: dict[str, Any] | None = None
    """Entries of a checkpoint as they were at the end of the last step or validation; None = no step was made."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.in_step, self.noted = False, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.in_step = True

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_step, self.noted = False, progress(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_validation = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.in_validation = False
        if self.noted is not None and not self.in_step:
            self.noted = progress(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (not trainer.training and not trainer.validating) or LOOPS not in checkpoint:
            return
        between = not self.in_step and not self.in_validation
        checkpoint.update((progress(trainer) if between else self.noted) or {})


def progress(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint says of the loops and of the place in the data.

    Where the step is logged and a validation follows, the loops are said to stand at its first batch: a run that
    continues there begins with it. Otherwise Lightning takes it for done.
    """
    state: dict[str, Any] = {LOOPS: {"fit_loop": trainer.fit_loop.state_dict()}}
    batches = state[LOOPS]["fit_loop"]["epoch_loop.batch_progress"]
    ended = batches["total"]["completed"] == batches["total"]["processed"] - 1  # saved in on_train_batch_end
    if ended and validation_follows(trainer):
        for count in (batches["total"], batches["current"]):
            count["completed"] = count["processed"]
        seen = state[LOOPS]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for count, done in ((seen["total"], seen["total"]["completed"]), (seen["current"], 0)):
            count.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and (place := data.state_dict()):
        state[type(data).__qualname__] = place
    return state
