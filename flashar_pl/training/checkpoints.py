"""Which steps of a run are saved, beyond what ModelCheckpoint is told, and how a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.files import replacing
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.steps import StepCallback


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: the old one goes when the new one is whole.

    Lightning makes the file in memory, then in the system's temporary directory, and moves it. To another file system
    that is a copy over the old checkpoint, and a job that is killed meanwhile has neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with replacing(path) as part:
            torch.save(checkpoint, part)


class LastCheckpoint(StepCallback):
    """Lets every ModelCheckpoint that monitors nothing hold the last step when training ends, not the last thousand."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)  # writes directories, in its own way
        if stage == "fit" and not sharded and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._start or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a finished run was started again
        for callback in trainer.checkpoint_callbacks:
            for kept, path in _last_paths(trainer, callback):
                there = [at for at in (kept, path) if at and Path(at).exists()] if trainer.is_global_zero else []
                held = any(RunCheckpoint(at).content["global_step"] == trainer.global_step for at in there)
                if not trainer.strategy.broadcast(held):
                    trainer.save_checkpoint(path, weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn where gradients of some batches are accumulated: a checkpoint has none."""
        if self.within_step:
            rank_zero_warn(
                f"A checkpoint is saved in the middle of step {trainer.global_step + 1}, between the batches of "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: a run that continues from it "
                "loses the gradients of the batches before. Save and validate after a whole number of steps."
            )


def _last_paths(trainer: Trainer, callback: Any) -> list[tuple[str, str]]:
    """(what it has saved last, where it would keep the present state if this were one of its steps)."""
    if not isinstance(callback, ModelCheckpoint) or callback.save_weights_only:
        return []
    paths = []
    if callback.monitor is None and callback.save_top_k != 0:
        values = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        name = callback.format_checkpoint_name({**trainer.callback_metrics, **values})
        paths.append((callback.best_model_path, name))
    if callback.save_last is True and callback.last_model_path:
        paths.append(("", callback.last_model_path))
    return paths
