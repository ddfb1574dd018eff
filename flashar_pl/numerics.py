"""Numerics in one place: dtypes, the fp32 islands, and random numbers.

- Masks are bool, True = may attend; "causal" and None stand for those that kernels need not read.
- Softmax, cross-entropy, gate and RoPE are computed in float32 whatever the model's dtype: bfloat16 has 8 bits of
  mantissa, too few for sums over 16,384 or more codes.
- Master weights are float32; compute may be bfloat16 (`autocast`). At a learning rate of 2e-5 a pure bfloat16 AdamW
  rounds most updates away.
- Statistics of metrics are float64 (`flashar_pl.metrics`).
- One float64 uniform per (sample seed, cell), so that a sample depends on its seed and not on device count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of compute dtypes on the command line."""


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype called `name` (fp32, bf16 or fp16)."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64 (tests compare gradients in float64)."""
    return x if x.dtype == torch.float64 else x.float()


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The floating dtype of more bits."""
    return a if a.itemsize >= b.itemsize else b


def is_cut(tensor: object) -> bool:
    """Whether a tensor is a DTensor, cut over devices. Asks without importing its module, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            drawn = args[0] if args else (kwargs or {})["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules are made without memory. Their weights are not drawn: for that torch imports its compiler, seconds."""
    with torch.device("meta"), _Undrawn():
        yield


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. From pageable memory a copy to a GPU would wait for all that it has been given to do."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def full_precision(device_type: str) -> AbstractContextManager:
    """A region that autocast leaves alone."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def strict_float32(device_type: str) -> Iterator[None]:
    """float32 arithmetic: neither autocast nor TF32, whatever the caller has switched on.

    For tokenizers, whose codes flip in lower precision, and for features that are compared with others' numbers.
    """
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in (convolution, *products)]
    for each in (convolution, *products):
        each.fp32_precision = "ieee"
    general = torch.get_float32_matmul_precision()  # torch refuses to multiply where this says otherwise
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(general)
        for each, precision in zip((convolution, *products), before, strict=True):
            each.fp32_precision = precision


def sample_seeds(seeds: int | Tensor | list[int] | None, batch: int) -> list[int]:
    """One seed per sample: None draws them, an int s gives s + i, a sequence of `batch` ints is taken as it is."""
    if seeds is None:
        return torch.randint(0, 2**31 - 1, (batch,)).tolist()
    given: Any = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    if isinstance(given, Integral):  # numpy's integers too
        return [int(given) + i for i in range(batch)]
    try:
        listed = [index(seed) for seed in given]
    except TypeError as error:
        raise ValueError(f"seeds is {given!r}; expected one int or {batch} ints.") from error
    if len(listed) != batch:
        raise ValueError(f"seeds has {len(listed)} entries; expected one int or {batch} entries.")
    return listed


WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices."""


def float64_device(device: torch.device) -> torch.device:
    """Where float64 of a device's computations is: on it, or on the CPU for Apple's GPUs, which have none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def uniforms(seeds: list[int], n_cells: int) -> Tensor:
    """(B, N) float64 in [0, 1) on the CPU: row i is drawn in raster order from a generator seeded with seeds[i]."""
    rows = [torch.rand(n_cells, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, n_cells, dtype=torch.float64)
