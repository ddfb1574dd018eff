"""Numbers that are not finite: a step with such a loss or gradient changes no weight, and none is saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flashar_pl.training.sharded.units import local
from flashar_pl.training.steps import StepCallback, become, logs

NAMED = 4
"""How many parameters a message names."""


class NotFinite(ValueError):
    """A loss, a gradient or a weight is infinite or no number, equally on every rank."""


class PatientStopping(EarlyStopping):
    """An EarlyStopping for which a metric that a validation could not compute says nothing.

    Lightning's ends the run there, or counts it as a validation without improvement.
    """

    given = EarlyStopping.__qualname__
    """Name of the class that the user configured."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, self.given, 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._lacks(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._lacks(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def _lacks(self, trainer: Trainer) -> bool:
        return bool(trainer.callback_metrics.get(self.monitor, torch.zeros(())).isnan().any())


class FiniteSteps(StepCallback):
    """Ends a run at a loss or gradient that is not finite, or leaves the step out.

    On a CPU, and where steps may be left out, it looks before the weights are changed. A GPU would wait for the host in
    every step: there it looks when a step is logged, before a validation and before a checkpoint, which is not written
    then; the run is replayed from the one before.

    Args:
        skip: how many such steps of a run are left out, weights and moments as they were; the next one ends it.
    """

    def __init__(self, skip: int) -> None:
        self.skip, self.skipped = skip, 0
        self._losses: list[Tensor] = []
        self._samples: list[Tensor | None] = []
        """Of the batches of the step in progress."""
        self._unseen: dict[int, list[Tensor | None]] = {}
        """Samples of the steps that were not looked at."""
        self._first: Tensor | None = None
        """() int64 on the device: the first of them that is not finite; 0 = none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.early_stopping_callbacks:
            become(callback, PatientStopping, EarlyStopping)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._losses, self._samples, self._unseen, self._first = [], [], {}, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples.append(getattr(batch, "index", None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._samples = [], []
        if logs(trainer, trainer.global_step):
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def check(self, trainer: Trainer, module: LightningModule, norm: Tensor) -> None:
        """Before the optimiser's step: its losses, and the norm () of its gradients. A step that is left out has none.

        Raises:
            NotFinite: one is not, and no more steps are left out.
        """
        if str(trainer.precision).startswith("16"):
            return  # the scaler of float16 looks for them, and leaves such steps out
        numbers = torch.stack([norm.float(), *(loss.float().to(norm.device) for loss in self._losses)])
        finite, step = numbers.isfinite().all(), trainer.global_step + 1
        if self.skip == 0 and norm.device.type != "cpu":
            before = torch.zeros((), dtype=torch.int64, device=norm.device) if self._first is None else self._first
            self._first = before + (~finite & (before == 0)) * step
            self._unseen[step] = self._samples
            return
        if trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            return
        what = f"step {step}: {self._reason(module)}"
        if self.skipped >= self.skip:
            raise NotFinite(f"{what} No weight was changed by it; a run that continues comes to the same step.")
        self.skipped += 1
        rank_zero_warn(f"{what} The step is left out, {self.skipped} of at most {self.skip}.")
        for parameter in module.parameters():
            parameter.grad = None

    def _look(self, trainer: Trainer) -> None:
        """Raises NotFinite for the first step that was not looked at and is not finite."""
        first = 0 if self._first is None else int(self._first)
        if not trainer.strategy.reduce_boolean_decision(first == 0, all=True):
            samples = f"samples {_ids(self._unseen[first])}" if first else "samples of another device"
            raise NotFinite(
                f"step {first or trainer.global_step}: a loss or gradient is not finite; {samples}. It was seen after "
                f"step {trainer.global_step}; the checkpoint before stays, and a run from there comes to the same step."
            )
        self._unseen = {}

    def _reason(self, module: LightningModule) -> str:
        """What is not finite, and in which batches."""
        wrong = [not bool(loss.isfinite()) for loss in self._losses]
        chosen = [ids for ids, bad in zip(self._samples, wrong, strict=True) if bad or not any(wrong)]
        losses = ", ".join(f"{float(loss):g}" for loss in self._losses)
        named = not_finite({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        gradients = f"gradients of {named} are not finite" if named else "gradients are finite"
        return f"the loss is {losses}, and {gradients}; samples {_ids(chosen)}."

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises NotFinite for weights that are not: the checkpoint before stays."""
        if not trainer.training and not trainer.validating:
            return
        self._look(trainer)
        named = not_finite(dict(pl_module.named_parameters()))
        if not trainer.strategy.reduce_boolean_decision(not named, all=True):
            raise NotFinite(f"after step {trainer.global_step} weights are not finite: {named}. They are not saved.")


def _ids(batches: list[Tensor | None]) -> str:
    return ", ".join(str(i) for ids in batches if ids is not None for i in ids.tolist()) or "without ids"


def not_finite(tensors: dict[str, Any]) -> str:
    """Names of tensors with such elements, the first few of them; with shards those of this rank. "" = none."""
    if not tensors:
        return ""
    flags = torch.stack([local(tensor.detach()).isfinite().all() for tensor in tensors.values()]).tolist()
    names = [name for name, finite in zip(tensors, flags, strict=True) if not finite]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
