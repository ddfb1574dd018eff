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
