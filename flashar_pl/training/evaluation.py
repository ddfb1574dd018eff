"""What a validation or test measures on held-out images: losses, likelihood and gate.

Shapes: B samples, H, W grid, h x w pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flashar_pl.backbones.condition import Batch
from flashar_pl.files import patiently
from flashar_pl.pictures import gate_picture, save_png
from flashar_pl.training.logger import log_points, take_back, tensorboards
from flashar_pl.training.protocol import Trained, trained
from flashar_pl.training.validation import LossSums


class SplitCallback(Callback, ABC):
    """The same work for validation and test: `begin`, `add` for every batch, `finish`."""

    split = "val"
    """Or "test": what results are named after."""
    loaded_step = 0
    """Optimiser steps of the checkpoint that was loaded, for the names of pictures."""

    @abstractmethod
    def begin(self, trainer: Trainer, module: Trained) -> None:
        """A pass over a split starts."""

    @abstractmethod
    def add(self, module: Trained, losses: dict[str, Tensor], batch: Batch) -> None:
        """One batch, and what the validation step returned for it."""

    @abstractmethod
    def finish(self, trainer: Trainer, module: Trained) -> dict[str, float]:
        """The pass is over; what to log below the split's name, equal on every rank."""

    def reports(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether the pass counts: not a sanity check, unless that is the validation before the first step."""
        return not trainer.sanity_checking or trained(module).validation.at_start

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loaded_step = int(checkpoint.get("global_step", 0))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.split = "test" if trainer.testing else "val"
        self.begin(trainer, trained(pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.add(trained(pl_module), outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.reports(trainer, pl_module):
            return
        points = {}
        for name, value in self.finish(trainer, trained(pl_module)).items():
            if not math.isfinite(value):
                self.miss(trainer, name, f"it is {value}")
                continue
            shown = self.split == "val" and name == "nll"
            points[f"{self.split}/{name}"] = value
            own = trainer.state.fn == TrainerFn.FITTING  # Lightning counts steps in another way
            logger = False if own else None
            pl_module.log(f"{self.split}/{name}", value, shown, logger, sync_dist=True, batch_size=1)
        if points and trainer.state.fn == TrainerFn.FITTING:
            log_points(trainer, {**points, "epoch": float(trainer.current_epoch)})
            trainer.logged_metrics.update({name: torch.tensor(value) for name, value in points.items()})

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def measure(self, trainer: Trainer, scores: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Compute scores; one that cannot be computed is missing in a fit, and an error of a validation or test."""
        results = {}
        for name, score in scores.items():
            try:
                results[name] = float(score())
            except (ValueError, RuntimeError, ArithmeticError) as error:
                if trainer.state.fn != TrainerFn.FITTING:
                    raise
                self.miss(trainer, name, " ".join(str(error).split()) or type(error).__name__)
        return results

    def miss(self, trainer: Trainer, name: str, reason: str) -> None:
        """Say why a validation of a fit lacks a result: for those who monitor it it is no number. It is on all ranks.

        Raises:
            ValueError: it was what a validation or test is run for.
        """
        text = f"{self.split}/{name} of step {trainer.global_step} is missing: {reason}"
        if trainer.state.fn != TrainerFn.FITTING:
            raise ValueError(text)
        rank_zero_warn(text)
        trainer.lightning_module.log(f"{self.split}/{name}", math.nan, logger=False, batch_size=1)
        for logger in tensorboards(trainer):
            logger.experiment.add_text(f"{self.split}/{name}", text, trainer.global_step)

    def show(self, trainer: Trainer, tag: str, folder: str, image: Tensor) -> None:
        """A picture (3, h, w) uint8 for loggers that take any, and as PNG in `folder` of the log directory."""
        directory = trainer.log_dir  # every rank asks: it is broadcast
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(tag, [image.permute(1, 2, 0).numpy()], step=trainer.global_step)
        for logger in tensorboards(trainer):
            logger.experiment.add_image(tag, image.numpy(), trainer.global_step)
        if directory is not None:
            name, step, fn = tag.split("/")[0], trainer.global_step, trainer.state.fn
            if fn is not None and fn != TrainerFn.FITTING:  # counts no steps; the pictures of the fit stay
                name, step = fn.value, self.loaded_step
            path = Path(directory) / folder / f"{name}_step_{step:07d}.png"
            patiently(lambda: save_png(image, path))


class HeldOutLosses(SplitCallback):
    """Losses, likelihood and the mean gate of a split, over all its grids; the gate's map is of the first one.

    Measured on the averaged weights where the run keeps them. The number of ranks changes no result.
    """

    sums: LossSums | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trained(pl_module).validation.at_start and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = math.inf  # the whole split

    def begin(self, trainer: Trainer, module: Trained) -> None:
        self.sums = None
        if trainer.sanity_checking and module.validation.at_start:
            take_back(trainer, 0)  # of a run that was stopped before its first checkpoint

    def add(self, module: Trained, losses: dict[str, Tensor], batch: Batch) -> None:
        plan = module.evaluation_plan(batch.codes)
        if self.sums is None:
            self.sums = LossSums(plan, batch.codes.device)
        self.sums.add(losses, batch.valid, plan)

    def finish(self, trainer: Trainer, module: Trained) -> dict[str, float]:
        assert self.sums is not None, "no batch was seen"
        results = self.sums.reduce(lambda values: sum_over_ranks(trainer, values))
        if "gate_mean" in results:
            self.show(trainer, f"{self.split}/gate_map", "gate", gate_picture(self.sums.gate_map.cpu()))
        return results


def sum_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum of a tensor over ranks."""
    return trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]
