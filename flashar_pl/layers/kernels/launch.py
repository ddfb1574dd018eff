"""Where kernels are started, so that they can be counted, and whether they can run here.

Triton runs kernels on an NVIDIA GPU or, where TRITON_INTERPRET=1 stands in the environment before it is imported,
slowly on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_counting: list[list[str]] = []


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`; None = they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device}, and the kernels need a CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 (A100) or later"
    return None


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels started inside, in order."""
    names: list[str] = []
    _counting.append(names)
    try:
        yield names
    finally:
        _counting.remove(names)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel` on `grid`. options: its constants, num_warps and num_stages."""
    for names in _counting:
        names.append(kernel.fn.__name__)
    kernel[grid](*arguments, **options)
