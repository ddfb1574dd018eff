"""A projection with one byte per weight and a scale per output.

w ~ s q with q an int8 or a float8 (e4m3), s = the largest |w| of the output over the largest |q|. On a GPU few rows go
through a kernel that reads the bytes, multiplies them in the dtype of the activations, in which they are exact, and
applies s to the sums. Many rows, and int8 on a processor, are rounded to bytes too (byte_products.py). What a device
cannot multiply in bytes is turned back before the product, which saves memory and no time.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.layers.byte_products import byte_product, exact_on_this_processor, multiplies
from flashar_pl.layers.kernels.launch import launch, why_not
from flashar_pl.layers.kernels.tiles import tile

Rounding = Literal["int8", "fp8"]
ROUNDED = get_args(Rounding)
BYTES: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}
"""Name -> dtype of q and its largest value."""
MOST_ROWS = 256
"""M up to which the kernel runs: it reads the weights once for every 64 rows."""


def rounding_of(weight_format: str) -> Rounding | None:
    """The formats of weights that are one of these; None = plain or packed."""
    return cast(Rounding, weight_format) if weight_format in ROUNDED else None


class RoundedLinear(nn.Module):
    """x W^T + b. For inference: no gradients."""

    q: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> None:
        """weight (N, K), bias (N,): copied, to where the weight is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        kind, most = BYTES[rounding]
        self.most = most
        self.exact = exact_on_this_processor()
        wide = weight.detach().float()
        scale = wide.abs().amax(1) / most  # (N,)
        q = wide / scale.where(scale > 0, 1.0)[:, None]  # (N, K); an output without weights stays zero
        self.register_buffer("q", (q.round() if kind == torch.int8 else q).to(kind))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = x.numel() // self.in_features
        if x.is_cuda and rows <= MOST_ROWS and not torch.compiler.is_compiling() and why_not(x.device) is None:
            return rounded_product(x, self.q, self.scale, self.bias)
        if multiplies(x, self.q, self.exact):
            return byte_product(x, self.q, self.scale, self.bias, self.most)
        return F.linear(x, (self.q.float() * self.scale[:, None]).to(x.dtype), self.bias)


def rounded_product(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times q (N, K) of one byte each, times scale (N,) float32, plus bias, by the kernel `project`."""
    import triton.language as tl

    from flashar_pl.layers.kernels.block import project

    flat = x.reshape(-1, x.shape[-1]).contiguous()  # (M, K)
    (m, k), n = flat.shape, len(q)
    out, cut = x.new_empty(*x.shape[:-1], n), tile(m)
    launch(
        project, (-(-n // cut.n), -(-m // cut.m)), flat, q, scale if bias is None else bias, scale, out, m, n,
        K=k, BIAS=bias is not None, SCALED=True, BM=cut.m, BN=cut.n, BK=cut.k, ACC=tl.float32, **cut.options,
    )  # fmt: skip
    return out
