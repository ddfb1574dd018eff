"""Accumulated gradients: intervals count optimiser steps, and an epoch is a whole number of them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class WholeSteps(Callback):
    """With `trainer.accumulate_grad_batches` n, validates every `val_check_interval` steps of n batches.

    Lightning counts batches, and makes a step of what is left at the end of an epoch: then n batches are not a step,
    and intervals in batches drift away from those in steps. Such a rest is left out, other samples in each epoch.
    """

    def __init__(self) -> None:
        self._given: dict[str, Any] = {}
        """Settings of the Trainer to put back."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        n, interval = trainer.accumulate_grad_batches, trainer.val_check_interval
        if stage != "fit" or n < 2 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        changed: dict[str, Any] = {}
        if (batches := _batches(trainer)) is not None:
            steps = batches // n
            if steps == 0:
                raise ValueError(
                    f"trainer.accumulate_grad_batches is {n}, but an epoch has {batches} batches; expected at most "
                    f"{batches}, or a larger data.batch_size."
                )
            changed["limit_train_batches"] = steps * n
            if isinstance(interval, float) and interval < 1:
                changed["val_check_interval"] = max(int(steps * interval), 1) * n
        if isinstance(interval, int):
            changed["val_check_interval"] = interval * n
        self._given = {name: getattr(trainer, name) for name in changed}
        for name, value in changed.items():
            setattr(trainer, name, value)
        rest = f", and {batches % n} batches at the end of an epoch are left out" if batches and batches % n else ""
        rank_zero_info(f"trainer.accumulate_grad_batches is {n}: intervals count steps of {n} batches{rest}.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, value in self._given.items():
            setattr(trainer, name, value)
        self._given = {}


def _batches(trainer: Trainer) -> int | None:
    """Batches of an epoch; None = not known before it ends."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    if data is None or limit == 0:
        return None
    try:
        n = len(data.train_dataloader())
    except TypeError:
        return None
    return min(n, limit) if isinstance(limit, int) else int(n * limit)
