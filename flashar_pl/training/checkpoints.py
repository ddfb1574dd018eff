"""Which steps of a run are saved, beyond what ModelCheckpoint is told, and how a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.files import patiently, replacing
from flashar_pl.tensor_files import SUMS, page_sums
from flashar_pl.training.lightning_private import save_after_validation, steps_between, waits_for_validation
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.steps import StepCallback, become, is_last_step, validation_follows
from flashar_pl.training.strategies import finish_saving

CURVES = ("train/", "lr/", "data/")
"""How the metrics begin that training steps log."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: the old one goes when the new one is whole.

    Lightning makes the file in memory, then in the system's temporary directory, and moves it. To another file system
    that is a copy over the old checkpoint, and a job that is killed meanwhile has neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        patiently(lambda: self._write(checkpoint, path))

    def _write(self, checkpoint: dict[str, Any], path: Any) -> None:
        with replacing(path) as part:
            torch.save({**checkpoint, SUMS: page_sums(checkpoint["state_dict"].values())}, part)


class StepCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that counts optimiser steps, and ranks a step by its own validation.

    Lightning's takes each batch whose gradients are only accumulated for the step before, and ranks by the value of an
    earlier validation where the step's own comes after it.
    """

    step = -1
    """Completed optimiser steps when the last batch ended."""

    @classmethod
    def adopt(cls, callback: Any) -> None:
        """Make one of a ModelCheckpoint in place."""
        become(callback, cls, ModelCheckpoint)
        if not isinstance(callback, cls) or not callback.ranks_by_validation:
            return
        if str(callback.monitor).startswith("val") or not callback.every_n_epochs:
            save_after_validation(callback)  # others may be an epoch's own: the first validation tells

    _earlier: Any = None
    """What its metric was when a validation began: where it is another when it ends, it is one of validations."""

    given = ModelCheckpoint.__qualname__
    """Name of the class that the user configured."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, self.given, 1)

    @property
    def ranks_by_validation(self) -> bool:
        """Whether a step may lack its metric until it is validated: it is no point of our curves."""
        return self.monitor not in (None, "step", "epoch") and not str(self.monitor).startswith(CURVES)

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Asked for before a new name is taken, which the checkpoint that is being written may have."""
        finish_saving(trainer.strategy)
        return super().file_exists(filepath, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self.step = self.step, trainer.global_step
        if before == self.step or (is_last_step(trainer) and validation_follows(trainer)):
            return  # the last step is saved when training ends, not as done while it is to be validated
        if not self.ranks_by_validation:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        assert self.monitor is not None
        waited = waits_for_validation(self)
        waits_for_validation(self, False)
        earlier = trainer.callback_metrics.pop(self.monitor, None)  # without one it waits, if this is one of its steps
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if earlier is not None:
            trainer.callback_metrics[self.monitor] = earlier
        now = waits_for_validation(self)
        waits_for_validation(self, waited or now)
        if now and self.save_last is True and not validation_follows(trainer):
            last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            self.last_model_path = self.last_model_path or last  # it is in the file
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._earlier = trainer.callback_metrics.get(str(self.monitor))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ranks_by_validation and trainer.callback_metrics.get(str(self.monitor)) is not self._earlier:
            save_after_validation(self)
        super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waits_for_validation": waits_for_validation(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        waits_for_validation(self, state_dict.get("waits_for_validation", False))


class LastCheckpoint(StepCallback):
    """Lets every ModelCheckpoint that monitors nothing hold the last step when training ends, not the last thousand."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)  # writes directories, in its own way
        if stage == "fit" and not sharded and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles()
        if stage == "fit":
            for callback in trainer.checkpoint_callbacks:
                StepCheckpoint.adopt(callback)
                _check_logged(callback, trainer.log_every_n_steps)  # type: ignore[attr-defined]
                background = isinstance(strategy, ShardedStrategy) and strategy.background
                if background and getattr(callback, "save_last", None) == "link":
                    raise ValueError(
                        "save_last is link, and with trainer.strategy.init_args.background there is nothing to link to "
                        "yet; expected save_last true or null."
                    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._start or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a finished run was started again
        finish_saving(trainer.strategy)
        for callback in trainer.checkpoint_callbacks:
            for kept, path in _last_paths(trainer, callback):
                there = [at for at in (kept, path) if at and Path(at).exists()] if trainer.is_global_zero else []
                held = any(RunCheckpoint(at).content["global_step"] == trainer.global_step for at in there)
                if not trainer.strategy.broadcast(held):
                    trainer.save_checkpoint(path, weights_only=False)


def _check_logged(callback: Any, every: int) -> None:
    """ValueError for a ModelCheckpoint that would rank a step by the loss of an earlier one, the last that was logged.

    every: steps between points of the curves.
    """
    saved = steps_between(callback) if isinstance(callback, ModelCheckpoint) else 0
    monitor = getattr(callback, "monitor", None) or ""
    if monitor.startswith(CURVES) and every != 1 and (every < 1 or saved % every or not saved):
        what = f"every {saved} steps" if saved else "epochs or hours"
        raise ValueError(
            f"a ModelCheckpoint ranks {what} by {monitor}, which is known of every {every}; expected "
            "every_n_train_steps to be a multiple of trainer.log_every_n_steps, or another monitor, such as val/nll."
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
