"""Blocks through torch.compile: all but attention, which has kernels of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from flashar_pl.layers.torch_private import recompile_limit
from flashar_pl.layers.transformer import Block

PARTS = ("before", "after")
"""Methods of a block."""
VARIANTS = 128
"""Compiled forms of a part, of all models of a process: single and several positions, grids, dtypes, formats of
weights. Beyond torch's own limit of 8 it would run eagerly, unsaid."""


def compiled_parts(dynamic: bool | None = None) -> dict[str, Callable[..., Any]]:
    """A compiled function for each of `PARTS`, which serves all blocks. dynamic: as of torch.compile."""
    return {name: torch.compile(getattr(Block, name), dynamic=dynamic) for name in PARTS}


@contextmanager
def compiled_blocks(model: nn.Module, parts: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the blocks of `model` run `compiled_parts`; what cannot be compiled raises one of `compile_errors`."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for name, function in parts.items():
            setattr(block, name, partial(function, block))
    try:
        with recompile_limit(VARIANTS):
            yield
    finally:
        for block in blocks:
            for name in parts:
                delattr(block, name)


def first_line(error: Exception) -> str:
    """Why something could not be compiled, without where."""
    return " ".join(str(error).split("\n\n")[0].split())
