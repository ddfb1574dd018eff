"""A projection whose weights lie as oneDNN's CPU kernels read them.

`F.linear` lays a weight matrix out anew at every call. With many rows that is lost in the arithmetic; decoding has 2
to 32, and pays it at every step. Times are in docs/performance.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashar_pl.layers.torch_private import pack_linear, packed_linear

ROWS = 16
"""Rows of the input that the layout is chosen for: the middle of what decoding has."""


def unsupported(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype cannot be packed on this machine; None = they can."""
    try:
        packed = pack_linear(torch.zeros(8, 8, dtype=dtype), ROWS)
    except RuntimeError:  # oneDNN asks the processor
        return f"this processor has no {str(dtype).removeprefix('torch.')} products"
    return f"torch {torch.__version__} was built without oneDNN" if packed is None else None


class PackedLinear(nn.Module):
    """x W^T + b with a packed copy of W. For inference: no gradients, no state dict, no other device or dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight (n_out, n_in) on the CPU, of a dtype that `unsupported` has nothing against; bias (n_out,)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        packed = pack_linear(weight.detach().contiguous(), ROWS)
        assert packed is not None
        self._packed, self._bias = packed, None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return packed_linear(x, self._packed, self._bias)
