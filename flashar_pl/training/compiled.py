"""Training with compiled blocks."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flashar_pl.layers.torch_private import compile_errors, recompile_limit
from flashar_pl.layers.transformer import Block

PARTS = ("before", "after")
"""Of a block: all but attention, which has kernels of its own."""
VARIANTS = 128
"""Compiled forms of a part: stages, dtypes, grids. Beyond torch's own limit of 8 it would run eagerly, unsaid."""


class CompileBlocks(Callback):
    """Trains through torch.compile of the blocks, whatever the strategy; validation and its samples stay eager.

    The first steps of either stage take the compiler's time. Losses are those of eager blocks up to rounding; dropout
    draws other values. Where nothing can be compiled, training goes on without, and says why.
    """

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._limit = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cause = refusal(pl_module.device)
        if cause is not None:
            warnings.warn(f"the blocks are not compiled, training goes on without: {cause}", stacklevel=2)
            return
        self._limit.enter_context(recompile_limit(VARIANTS))
        self._functions = {name: torch.compile(getattr(Block, name)) for name in PARTS}
        self._compile(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compile(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._functions = {}
        self._restore(pl_module)
        self._limit.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _compile(self, pl_module: LightningModule) -> None:
        for block in _blocks(pl_module):
            for name, function in self._functions.items():
                setattr(block, name, partial(function, block))

    def _restore(self, pl_module: LightningModule) -> None:
        for block in _blocks(pl_module):
            for name in PARTS:
                vars(block).pop(name, None)


def refusal(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None = it can."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except compile_errors() as error:
        return " ".join(str(error).split("\n\n")[0].split())
    return None


def _blocks(pl_module: LightningModule) -> list[Block]:
    return [module for module in pl_module.modules() if isinstance(module, Block)]
