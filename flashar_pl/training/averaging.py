"""Averaged weights: a second model that follows the trained one, and is what a run validates and samples.

What never trains, a backbone under LoRA, is the same memory in both models, and checkpoints hold it once, as the
trained model's. What only a stage freezes is averaged: it trains later.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from flashar_pl.checkpoints.runs import EMA_PREFIX, NET_PREFIX
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import adaptation, frozen_names
from flashar_pl.training.protocol import trained
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.sharded.units import local
from flashar_pl.training.steps import StepCallback


def average_of(net: GridModel, strategy: Strategy | None) -> GridModel:
    """A model for the averages of `net`'s weights, frozen; the parameters of `net` that never train are its own too."""
    if isinstance(strategy, ShardedStrategy):
        average = strategy.build(net.config(), adaptation(net), like=net)
    else:
        never = frozen_names(net)
        average = copy.deepcopy(net, {id(p): p for name, p in net.named_parameters() if name in never})
    return average.requires_grad_(False)


@torch.no_grad()
def follow_frozen(net: GridModel, average: GridModel | None) -> None:
    """Copy what never trains, where FSDP2 has padded a shard and the average could not share its memory."""
    if average is None:
        return
    weights = dict(net.named_parameters())
    for name in frozen_names(net):
        here, there = local(average.get_parameter(name)), local(weights[name])
        if here.data_ptr() != there.data_ptr():
            here.copy_(there)


def keep_frozen_once(module: LightningModule) -> None:
    """Let the state dict of `module` leave out what the average shares, and read one with averages that it lacks, or
    without those that it has: they start at the weights."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_pre_hook(_complete)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if trained(module).ema is not None:
        for name in frozen_names(trained(module).net):
            del state[f"{prefix}{EMA_PREFIX}{name}"]


def _complete(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    average = trained(module).ema
    if average is None:
        for name in [name for name in state if name.startswith(prefix + EMA_PREFIX)]:
            del state[name]
        return
    for name in average.state_dict():
        weight = state.get(f"{prefix}{NET_PREFIX}{name}")
        if weight is not None:
            state.setdefault(f"{prefix}{EMA_PREFIX}{name}", weight)


class EmaUpdate(StepCallback):
    """Moves the averaged weights towards the trained ones after every optimiser step."""

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; expected 0 <= ema_decay < 1, such as 0.999.")
        self.decay = decay

    @torch.no_grad()
    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = trained(pl_module)
        assert module.ema is not None
        frozen, weights = frozen_names(module.net), dict(module.net.named_parameters())
        for name, average in module.ema.named_parameters():
            if name not in frozen:
                local(average).lerp_(local(weights[name]), 1 - self.decay)
