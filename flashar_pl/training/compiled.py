"""Training with compiled blocks, and on a GPU with FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from flashar_pl.backbones.base import Backbone
from flashar_pl.layers.compiled import compiled_blocks, compiled_parts, first_line
from flashar_pl.layers.torch_private import compile_errors
from flashar_pl.training import flex
from flashar_pl.training.flex import FlexMasks, flex_masks
from flashar_pl.training.protocol import trained


class CompileBlocks(Callback):
    """Trains through torch.compile of the blocks, whatever the strategy; validation and its samples stay eager.

    The first steps of either stage take the compiler's time. Losses are those of eager blocks up to rounding; dropout
    draws other values. Where nothing can be compiled, training goes on without, and says why.

    Args:
        attention: auto = FlexAttention on a GPU, where it does what the bool masks do, which the first step tries; else
            it says why not. dense = bool masks, as on a CPU.
    """

    def __init__(self, attention: Literal["auto", "dense"] = "auto") -> None:
        if attention not in ("auto", "dense"):
            raise ValueError(f"attention is {attention!r}; expected auto or dense.")
        self.attention = attention
        self._parts: dict[str, Callable[..., Any]] = {}
        self._masks: list[FlexMasks] = []
        self._inside = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cause = refusal(pl_module.device)
        if cause is not None:
            warnings.warn(f"the blocks are not compiled, training goes on without: {cause}", stacklevel=2)
            return
        self._parts = compiled_parts()
        if self.attention == "auto" and pl_module.device.type == "cuda":
            self._masks = masks_of(trained(pl_module).net)
        self._enter(pl_module)

    def _enter(self, module: nn.Module) -> None:
        self._inside.enter_context(compiled_blocks(module, self._parts))
        self._inside.enter_context(flex_masks(self._masks))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inside.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._parts:
            self._enter(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts, self._masks = {}, []
        self._inside.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def masks_of(model: nn.Module) -> list[FlexMasks]:
    """Those of a model's backbones, for compiled FlexAttention; none where `flex.refusal` says why."""
    from torch.nn.attention.flex_attention import flex_attention

    if (cause := flex.refusal(model)) is not None:
        warnings.warn(f"training goes on without FlexAttention: {cause}", stacklevel=2)
        return []
    kernel = torch.compile(flex_attention)
    return [FlexMasks(module, kernel) for module in model.modules() if isinstance(module, Backbone)]


def refusal(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None = it can."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except compile_errors() as error:
        return first_line(error)
    return None
