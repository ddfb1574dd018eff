"""Devices by name, and how much memory they have and a block of code takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

USUAL_MEMORY = 2**33
"""Bytes that a machine is taken to have where its system does not tell."""
KNOWN = "auto, cpu, cuda, cuda:N or mps"


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" = the GPU if there is one. Raises ValueError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected {KNOWN}.") from error
    if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
        raise ValueError(f"device is {name!r}; expected {KNOWN}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        why = "finds no Apple GPU" if torch.backends.mps.is_built() else "is built without Apple's GPUs (Metal)"
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} {why}; use --device cpu.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} finds no CUDA device; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()}; the first is cuda:0.")
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {platform.machine()}"
    return _from_proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated: free GPU memory, or the machine's available memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return _bytes("meminfo", "MemAvailable") or _physical_memory() // 2


def _physical_memory() -> int:
    """Bytes of the machine; where it does not tell (Windows), `USUAL_MEMORY`."""
    if not hasattr(os, "sysconf"):
        return USUAL_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _from_proc(file: str, key: str) -> str:
    """The first value of a key in a file of /proc; "" where there is none."""
    path = Path("/proc", file)
    lines = (line.partition(":") for line in (path.read_text() if path.exists() else "").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def _bytes(file: str, key: str) -> int:
    """A value of /proc that is written as "N kB"; 0 where there is none."""
    return 1024 * int(_from_proc(file, key).removesuffix("kB") or 0)


@dataclass
class Peak:
    """Memory of a block of code."""

    before: int = 0
    bytes: int = 0
    """Largest use while it ran; on a CPU of the whole process. 0 = this system does not tell."""

    @property
    def extra(self) -> int:
        """What was added to the use before."""
        return max(0, self.bytes - self.before)


def resident_memory() -> int:
    """Bytes that this process holds, freed memory given back to the system; 0 where it does not tell."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return _bytes("self/status", "VmRSS")


def most_memory(device: torch.device) -> int:
    """Most bytes that tensors on this GPU, or this process on a CPU, have had at once; 0 where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _bytes("self/status", "VmHWM") or _largest_resident()


def _largest_resident() -> int:
    """Of this process, where there is no /proc (macOS). Linux counts in it what the process was before `exec`."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak memory of the block: the GPU allocator's, or the resident size of this process (Linux)."""
    peak, reset = Peak(), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
    else:
        peak.before = resident_memory()
        if reset.exists() and os.access(reset, os.W_OK):
            reset.write_text("5")  # VmHWM starts again from the present size
    yield peak
    if device.type == "cuda" or peak.before:  # else the system tells what the process has had, not this block
        peak.bytes = most_memory(device)
