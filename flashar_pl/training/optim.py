"""AdamW over parameter groups that know their role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from flashar_pl.models.base import ROLES, GridModel
from flashar_pl.models.lora import frozen_names
from flashar_pl.training.config import OptimiserConfig
from flashar_pl.training.sharded.compact_adamw import CompactAdamW
from flashar_pl.training.sharded.quantised_adamw import quantised_adamw
from flashar_pl.training.stages import Schedule


def parameter_groups(model: GridModel, weight_decay: float) -> list[dict[str, Any]]:
    """One group per role and kind of parameter, in a fixed order: a checkpoint refers to parameters by position.

    Matrices and embeddings (ndim >= 2) have weight decay, vectors none. Every group has its role under "role", and a
    name for `LearningRateMonitor`.
    Every parameter is in exactly one group, except for those that LoRA keeps frozen throughout, which are in none.
    """
    roles, frozen = model.roles(), frozen_names(model)
    parts: dict[tuple[str, bool], list[nn.Parameter]] = {
        (role, decays): [] for role in ROLES for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if name not in frozen:
            parts[roles[name], parameter.ndim >= 2].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "role": role,
            "name": role if decays else f"{role}_vectors",
            "weight_decay": _decay(parameters[0], weight_decay),
        }
        for (role, decays), parameters in parts.items()
        if parameters
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    wanted = {id(parameter) for name, parameter in model.named_parameters() if name not in frozen}
    assert set(grouped) == wanted, "a parameter is in no group"
    return groups


def adamw(
    model: GridModel,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
    state: Literal["fp32", "bf16", "8bit"] = "fp32",
) -> torch.optim.Optimizer:
    """AdamW over the parameters of the model, those of a frozen stage included: without gradient they are skipped.

    state: what the moments are kept in. "bf16" is `CompactAdamW`, "8bit" the block-wise quantised AdamW of torchao.

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
    groups = parameter_groups(model, weight_decay)
    if state == "fp32":
        return torch.optim.AdamW(groups, lr=lr, betas=betas)  # not fused: Lightning clips no fused one under bf16-mixed
    if state == "bf16":
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
        group["betas"], group["weight_decay"] = options.betas, _decay(group["params"][0], options.weight_decay)
        set_rate(group, options.lr * scale(step))


def _decay(parameter: torch.Tensor, weight_decay: float) -> float:
    """Matrices and embeddings decay, vectors do not."""
    return weight_decay if parameter.ndim >= 2 else 0.0
