"""A projection whose weights lie as oneDNN's CPU kernels read them.

`F.linear` lays a weight matrix out anew at every call. With many rows that is lost in the arithmetic; decoding has 2
to 32, and pays it at every step. Times are in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 16
"""Rows of the input that the layout is chosen for: the middle of what decoding has."""


def unsupported(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype cannot be packed on this machine; None = they can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return f"torch {torch.__version__} was built without oneDNN"
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in supported or not supported[dtype]():
        return f"this processor has no {str(dtype).removeprefix('torch.')} products"
    return None


class PackedLinear(nn.Module):
    """x W^T with a packed copy of W. For inference: no gradients, no state dict, no move to another device or dtype."""

    def __init__(self, weight: Tensor) -> None:
        """weight (n_out, n_in) on the CPU, of a dtype that `unsupported` has nothing against."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
