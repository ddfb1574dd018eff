"""The private names of Lightning that this package touches. `tests/test_private_names.py` says when one is gone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy


def ddp_options(strategy: DDPStrategy) -> dict[str, Any]:
    """Arguments for torch's DistributedDataParallel, to read and to complete before the model is wrapped.

    A strategy that Lightning makes from `trainer.strategy: ddp` or `auto` takes them in its constructor only, and that
    has run when the model says that it freezes parameters.
    """
    return strategy._ddp_kwargs


def waits_for_validation(callback: ModelCheckpoint, value: bool | None = None) -> bool:
    """Whether it saves after the next validation, whose metric it lacks; give a value to say so: its state does not."""
    if value is not None:
        callback._defer_save_until_validation = value
    return callback._defer_save_until_validation


def save_after_validation(callback: ModelCheckpoint) -> None:
    """Let it save when a validation ends, not when an epoch does: where it was told neither, Lightning decides by the
    interval of validations, and one that waits for a validation would wait for ever; at the end of an epoch it would
    rank a step by an earlier validation."""
    callback._save_on_train_epoch_end = False


def steps_between(callback: ModelCheckpoint) -> int:
    """Steps between checkpoints; 0 = it counts epochs or time."""
    return callback._every_n_train_steps
