"""Where kernels are started, so that they can be counted, and whether they can run here.

Triton runs kernels on an NVIDIA GPU or, where TRITON_INTERPRET=1 stands in the environment before it is imported,
slowly on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel started, or to be started."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Its constants by name, num_warps and num_stages."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.fn.__name__

    def start(self) -> None:
        """Run it where its tensors are, or on the meta device, whose tensors have no values, do nothing."""
        tensors = [each for each in self.arguments if isinstance(each, torch.Tensor)]
        if not any(each.is_meta for each in tensors):
            with torch.cuda.device_of(tensors[0]):  # Triton takes the current device, which may be another
                self.kernel[self.grid](*self.arguments, **self.options)


_watching: list[list[Launch]] = []


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`; None = they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model is on the CPU, and the kernels need a CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 (A100) or later"
    return None if device.type in ("cpu", "cuda", "meta") else f"the kernels do not run on {device.type}"


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """The launches inside, in order."""
    found: list[Launch] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching[:] = [each for each in _watching if each is not found]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel` on `grid`; see `Launch`."""
    made = Launch(kernel, grid, arguments, options)
    for found in _watching:
        found.append(made)
    made.start()
