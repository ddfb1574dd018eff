"""Which steps of a run are saved, beyond what ModelCheckpoint is told, and how a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from flashar_pl.training.sharded.strategy import ShardedStrategy


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: the old one goes when the new one is whole.

    Lightning makes the file in memory, twice, then in the system's temporary directory, which may be small or memory
    too, and moves it. From there to another file system a move is a copy over the old checkpoint, and a job that is
    killed meanwhile has neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.part")
        try:
            torch.save(checkpoint, part)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


class LastCheckpoint(Callback):
    """Lets every ModelCheckpoint that saves every N steps save once more when training ends.

    25 epochs of ImageNet in batches of 512 are 62,550 steps: with N = 1000 the file called last would hold step 62,000.
    Best checkpoints by a monitored value are left alone.
    """

    def __init__(self) -> None:
        self._start = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)  # writes directories, in its own way
        if stage == "fit" and not sharded and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._start:  # a finished run was started again
            return
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback._every_n_train_steps:
                continue
            if callback._should_skip_saving_checkpoint(trainer):
                continue
            candidates = callback._monitor_candidates(trainer)
            if callback.monitor is None:
                callback._save_topk_checkpoint(trainer, candidates)
            callback._save_last_checkpoint(trainer, candidates)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn where gradients of some batches are accumulated: a checkpoint has none."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            rank_zero_warn(
                f"A checkpoint is saved in the middle of step {trainer.global_step + 1}, between the batches of "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: a run that continues from it "
                "loses the gradients of the batches before. Save and validate after a whole number of steps."
            )
