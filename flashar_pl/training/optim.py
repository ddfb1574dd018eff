"""AdamW over parameter groups that know their role."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from flashar_pl.models.base import ROLES, GridModel
from flashar_pl.models.lora import frozen_names
from flashar_pl.training.config import OptimiserConfig
from flashar_pl.training.sharded.compact_adamw import CompactAdamW
from flashar_pl.training.sharded.quantised_adamw import quantised_adamw
from flashar_pl.training.stages import Schedule


def parameter_groups(model: GridModel, weight_decay: float, decay_vectors: bool = False) -> list[dict[str, Any]]:
    """One group per role and kind of parameter, in a fixed order: a checkpoint refers to parameters by position.

    A group has its role under "role", and a name for `LearningRateMonitor`. What LoRA keeps frozen is in none.
    """
    roles, frozen = model.roles(), frozen_names(model)
    trained = [(roles[name], p) for name, p in model.named_parameters() if name not in frozen]
    groups = []
    for role, decays in itertools.product(ROLES, (True, False)):
        name, decay = (role, weight_decay) if decays else (f"{role}_vectors", weight_decay * decay_vectors)
        if parameters := [p for own, p in trained if own == role and (p.ndim >= 2) == decays]:
            groups.append({"params": parameters, "role": role, "name": name, "weight_decay": decay})
    return groups


def adamw(model: GridModel, options: OptimiserConfig, unscaled: bool = True) -> torch.optim.Optimizer:
    """AdamW over the parameters of the model, those of a frozen stage included: without gradient they are skipped.

    One kernel updates a parameter where it is whole. unscaled: no scaler of float16 is about, which leaves gradients
    scaled for that kernel, and with it for those that clip them.

    Raises:
        ValueError: one of them is neither float32 nor float64 (at post-training learning rates an update of a bfloat16
            weight is mostly rounded away), or torchao is not installed.
    """
    frozen = frozen_names(model)
    for name, parameter in model.named_parameters():
        if name not in frozen and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}; master weights must be float32. Use precision bf16-mixed, not bf16-true."
            )
    groups, lr, betas = parameter_groups(model, options.weight_decay, options.decay_vectors), options.lr, options.betas
    if options.state == "fp32":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=unscaled and not model.sharded)
    if options.state == "bf16":
        return CompactAdamW(groups, lr=lr, betas=betas)
    try:
        return quantised_adamw(groups, lr, betas)
    except ImportError as error:
        raise ValueError(
            "optimiser.state is 8bit, which needs torchao: pip install 'flashar-pl[large]'. Without it use bf16."
        ) from error


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group; torchao keeps it in a tensor that must stay the same one."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def staged_rates(
    optimiser: torch.optim.Optimizer, schedule_of: Callable[[], Schedule]
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that gives every group the learning rate of its role. A step is an optimiser step.

    schedule_of: asked at every step; a checkpoint that is restored later may bring another length of the run.
    """

    def scale_of(role: str) -> Callable[[int], float]:
        return lambda step: schedule_of().scale(role, step)

    return torch.optim.lr_scheduler.LambdaLR(optimiser, [scale_of(group["role"]) for group in optimiser.param_groups])


def renew_settings(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int, options: OptimiserConfig) -> None:
    """Set what a run may change when it continues: a checkpoint brings the old values of groups and scheduler along.

    step: completed optimiser steps.
    """
    scheduler.base_lrs = [options.lr for _ in scheduler.base_lrs]
    for group, scale in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        decays = options.decay_vectors or group["params"][0].ndim >= 2
        group["betas"], group["weight_decay"] = options.betas, options.weight_decay if decays else 0.0
        set_rate(group, options.lr * scale(step))
