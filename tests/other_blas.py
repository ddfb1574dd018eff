"""A pytest plugin that makes float products round as another processor's BLAS might: `pytest -p tests.other_blas`.

On some processors a row of a product depends on how many rows stand beside it, on its place among them, and on where
the matrices lie in memory. Here every product on the CPU does: its terms are summed in an order that follows from the
number of rows and from the alignment, another one in the lower half of the rows. A test that passes under this
plugin asserts what the code does, not what one BLAS does. Compiled code and oneDNN's own layouts stay as they are.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

calls = 0
"""Products made so, for the test of this plugin."""
_library = torch.library.Library("aten", "IMPL")


@functools.lru_cache(1024)
def _order(k: int, seed: int) -> Tensor:
    """An order of k terms."""
    return torch.arange(k).roll(1 + seed % 7 * k // 7)


def _seed(a: Tensor, b: Tensor) -> int:
    return a.shape[-2] * 31 + a.data_ptr() % 64 * 7 + b.data_ptr() % 64 * 5


def _product(kernel: Any, keys: Any, *inputs: Tensor, **rest: Any) -> Tensor:
    """`kernel` for (a, b) or (bias, a, b), upper and lower rows apart."""
    global calls
    *bias, a, b = inputs
    if not a.is_floating_point() or 0 in (*a.shape, *b.shape):
        return kernel.call_boxed(keys, *inputs, **rest)
    calls += 1
    rows, k = a.shape[-2:]
    added = [each.expand(*a.shape[:-1], b.shape[-1]) for each in bias]
    parts = []
    cut = (rows + 1) // 2
    for part in (slice(0, cut), slice(cut, rows)) if rows > 1 else (slice(0, 1),):
        order = _order(k, _seed(a, b) + 3 * (part.start > 0))
        some = [each[..., part, :] for each in added]
        parts.append(kernel.call_boxed(keys, *some, a[..., part, :][..., order], b[..., order, :], **rest))
    return torch.cat(parts, -2)


def _attention(
    kernel: Any, keys: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """The flash kernel with its keys in another order."""
    global calls
    if not is_causal and k.shape[-2] > 1:
        calls += 1
        order = _order(k.shape[-2], _seed(q, k))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], k.shape[-2])[..., order]
        k, v = k[..., order, :], v[..., order, :]
    return kernel.call_boxed(keys, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("mm", "bmm", "addmm", "baddbmm", _ATTENTION):
        _made = _attention if _name == _ATTENTION else _product
        _kernel = torch.library.get_kernel(f"aten::{_name}", "CPU")
        _library.impl(_name, functools.partial(_made, _kernel), "CPU", with_keyset=True)
