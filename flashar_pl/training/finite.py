"""Numbers that are not finite: a step with such a loss or gradient changes no weight, and none is saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from flashar_pl.training.sharded.units import local
from flashar_pl.training.steps import StepCallback

NAMED = 4
"""How many parameters a message names."""


class NotFinite(ValueError):
    """A loss, a gradient or a weight is infinite or no number, equally on every rank."""


class FiniteSteps(StepCallback):
    """Ends a run at a loss or gradient that is not finite, before its weights are changed, or leaves the step out.

    Args:
        skip: how many such steps of a run are left out, weights and moments as they were; the next one ends it.
    """

    def __init__(self, skip: int) -> None:
        self.skip, self.skipped = skip, 0
        self._losses: list[Tensor] = []
        self._samples: list[Tensor | None] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._losses, self._samples = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples.append(getattr(batch, "index", None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._samples = [], []

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the optimiser's step: its losses and gradients. Where the step is left out, there are none after.

        Raises:
            NotFinite: one is not, and no more steps are left out.
        """
        if str(trainer.precision).startswith("16"):
            return  # the scaler of float16 looks for them, and leaves such steps out
        norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        numbers = torch.stack([norm.float(), *(loss.float().to(norm.device) for loss in self._losses)])
        if trainer.strategy.reduce_boolean_decision(bool(numbers.isfinite().all()), all=True):
            return
        what = f"step {trainer.global_step + 1}: {self._reason(module)}"
        if self.skipped >= self.skip:
            raise NotFinite(f"{what} No weight was changed by it.")
        self.skipped += 1
        rank_zero_warn(f"{what} The step is left out, {self.skipped} of at most {self.skip}.")
        for parameter in module.parameters():
            parameter.grad = None

    def _reason(self, module: LightningModule) -> str:
        """What is not finite, and in which batches."""
        wrong = [not bool(loss.isfinite()) for loss in self._losses]
        chosen = [ids for ids, bad in zip(self._samples, wrong, strict=True) if bad or not any(wrong)]
        samples = ", ".join(str(i) for ids in chosen if ids is not None for i in ids.tolist())
        losses = ", ".join(f"{float(loss):g}" for loss in self._losses)
        named = not_finite({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        gradients = f"gradients of {named} are not finite" if named else "gradients are finite"
        return f"the loss is {losses}, and {gradients}; samples {samples or 'without ids'}."

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises NotFinite for weights that are not: the checkpoint before stays."""
        if not trainer.training and not trainer.validating:
            return
        named = not_finite(dict(pl_module.named_parameters()))
        if not trainer.strategy.reduce_boolean_decision(not named, all=True):
            raise NotFinite(f"after step {trainer.global_step} weights are not finite: {named}. They are not saved.")


def not_finite(tensors: dict[str, Any]) -> str:
    """Names of tensors with such elements, the first few of them; with shards those of this rank. "" = none."""
    if not tensors:
        return ""
    flags = torch.stack([local(tensor.detach()).isfinite().all() for tensor in tensors.values()]).tolist()
    names = [name for name, finite in zip(tensors, flags, strict=True) if not finite]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
