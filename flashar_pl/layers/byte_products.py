"""Products of bytes with bytes, by the processor's or the GPU's own instructions: activations are rounded too.

x ~ a p row by row, as weights are w ~ s q output by output (rounded.py), with p of the dtype of q and a = the largest
|x| of the row over the largest |q|. Then x W^T ~ a s (p q^T). Sums of int8 are exact, those of float8 are float32.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.layers.torch_private import integer_product

LEAST_ROWS = 17
"""M from which a GPU multiplies int8."""
MULTIPLE = {torch.int8: 8, torch.float8_e4m3fn: 16}
"""What K and N have to be multiples of on a GPU."""
CAPABILITY = {torch.int8: (8, 0), torch.float8_e4m3fn: (9, 0)}
"""First CUDA compute capability that multiplies them, with a scale for each row."""


def multiplies(x: Tensor, q: Tensor, exact: bool) -> bool:
    """Whether the device of x (..., K) multiplies rows like these with q (N, K) faster than numbers of 16 bits.

    exact: `exact_on_this_processor`, asked beforehand: torch.compile would try it at every call.
    """
    if x.is_cuda:
        fits = not any(side % MULTIPLE[q.dtype] for side in q.shape)
        enough = q.dtype != torch.int8 or x.numel() >= LEAST_ROWS * x.shape[-1]
        return fits and enough and torch.cuda.get_device_capability(x.device) >= CAPABILITY[q.dtype]
    return x.device.type == "cpu" and q.dtype == torch.int8 and exact


@cache
def exact_on_this_processor() -> bool:
    """Whether sums of int8 products are exact: without the VNNI instructions oneDNN adds pairs of them in 16 bits."""
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((integer_product(largest, largest.T) == 64 * 127**2).all())


def byte_product(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, most: float) -> Tensor:
    """x (..., K) times q (N, K), times scale (N,) float32, plus bias (N,) -> (..., N) in the dtype of x.

    most: the largest |q| of its dtype.
    """
    wide = x.reshape(-1, x.shape[-1]).float()  # (M, K)
    row_scale = wide.abs().amax(1, keepdim=True) / most  # (M, 1)
    p = wide / row_scale.where(row_scale != 0, 1.0)
    if q.dtype == torch.int8:
        product = integer_product(p.round().to(q.dtype), q.T) * row_scale * scale
    else:
        rows = F.ScalingType.RowWise
        product = F.scaled_mm(p.to(q.dtype), q.T, row_scale, rows, scale[None], rows)  # (M, N) bfloat16
    product = product.to(x.dtype).reshape(*x.shape[:-1], len(q))
    return product if bias is None else product + bias
