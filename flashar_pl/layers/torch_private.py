"""Private names of torch, each with what it is for. `tests/test_private_names.py` says when one is gone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "compile_errors", "integer_product", "pack_linear", "packed_linear", "recompile_limit"]
"""`DispatchMode` sees every operator: torch documents it under this import path and has no other."""


def pack_linear(weight: Tensor, rows: int) -> Tensor | None:
    """A weight (n_out, n_in) as oneDNN's kernels read it for inputs of about `rows` rows; None = torch has no oneDNN.

    torch packs weights only inside its compiler and its quantisation; no public function does.
    """
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return None
    return operators._reorder_linear_weight(weight, rows)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n_in) times a weight of `pack_linear`, plus bias (n_out,) -> (..., n_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) times int8 (K, N) -> int32 (M, N). torch has no public product of integers."""
    return torch._int_mm(a, b)


def recompile_limit(n: int) -> AbstractContextManager[Any]:
    """Up to n variants of a compiled function, and an error rather than slow code beyond them.

    torch 2.11 has no public setting; later ones have an argument of torch.compile that does not raise.
    """
    return torch._dynamo.config.patch(
        recompile_limit=n, accumulated_recompile_limit=max(n, 256), fail_on_recompile_limit_hit=True
    )


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises. A function, because torch imports its compiler at the first use only."""
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
