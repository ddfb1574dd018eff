"""Training with compiled blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flashar_pl.layers.compiled import compiled_blocks, compiled_parts, first_line
from flashar_pl.layers.torch_private import compile_errors


class CompileBlocks(Callback):
    """Trains through torch.compile of the blocks, whatever the strategy; validation and its samples stay eager.

    The first steps of either stage take the compiler's time. Losses are those of eager blocks up to rounding; dropout
    draws other values. Where nothing can be compiled, training goes on without, and says why.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Callable[..., Any]] = {}
        self._inside = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cause = refusal(pl_module.device)
        if cause is not None:
            warnings.warn(f"the blocks are not compiled, training goes on without: {cause}", stacklevel=2)
            return
        self._parts = compiled_parts()
        self._inside.enter_context(compiled_blocks(pl_module, self._parts))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inside.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._parts:
            self._inside.enter_context(compiled_blocks(pl_module, self._parts))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts = {}
        self._inside.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def refusal(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None = it can."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except compile_errors() as error:
        return first_line(error)
    return None
