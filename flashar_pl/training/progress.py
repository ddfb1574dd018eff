"""What a run shows: optimiser steps with a time left for the whole run, one line per validation, no advertisements."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from flashar_pl.console import progress_bar
from flashar_pl.models.lora import frozen_names
from flashar_pl.training.protocol import trained

SHOWN = ("val/nll", "val/fid", "val/accuracy", "val/gate_mean")
"""Results of a validation that are worth a line."""
NOISE = ("litlogger", "litmodels", "available: ", "Seed set to", "`weights_only` was not set")
"""Advertisements and hardware lines of Lightning that are not shown."""
KNOWN_WARNINGS = ("does not have many workers", "LeafSpec", "exists and is not empty")


class RunProgress(ProgressBar):
    """A bar over all optimiser steps of the run, not one per epoch; a line now and then where there is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._shows = True
        self._steps: progress_bar | None = None
        self._done = 0

    def disable(self) -> None:
        self._shows = False

    def enable(self) -> None:
        self._shows = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._shows:
            return
        model = trained(pl_module).net
        parameters = sum(p.numel() for p in model.parameters())
        frozen = frozen_names(model)
        train = sum(p.numel() for name, p in model.named_parameters() if name not in frozen)
        self.print(
            f"{parameters:,} parameters on {trainer.world_size} x {trainer.strategy.root_device.type}"
            + (f"; {train:,} of them train" if frozen else "")
        )
        self._done = trainer.global_step
        self._steps = progress_bar(int(trainer.estimated_stepping_batches), "step", self._done)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is not None and trainer.global_step > self._done:
            self._steps.advance(trainer.global_step - self._done, loss=outputs["loss"])
            self._done = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        at_start = trainer.sanity_checking and trained(pl_module).validation.at_start
        if not at_start and (self._steps is None or trainer.sanity_checking):
            return
        metrics = trainer.callback_metrics
        if text := ", ".join(f"{name} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics):
            self.print(f"step {trainer.global_step}: {text}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        if self._shows:
            from tqdm import tqdm

            tqdm.write(" ".join(str(arg) for arg in args), file=sys.stderr)

    def on_train_end(self, *_: Any) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    on_exception = on_train_end  # type: ignore[assignment]


def _wanted(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in NOISE)


def quiet_lightning() -> None:
    """Hide Lightning's advertisements and hardware lines; real warnings stay."""
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").addFilter(_wanted)
    for text in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
