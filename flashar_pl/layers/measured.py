"""Which of two forms is the faster one on this processor: measured once on a machine, and kept.

No rule holds for all processors: in float32 and with two rows, packed products take 0.3 times the time of plain ones on
one and 1.1 times on another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from flashar_pl.devices import device_name
from flashar_pl.files import default_cache, write_json
from flashar_pl.layers.packed import PackedLinear
from flashar_pl.layers.transformer import attention
from flashar_pl.text_files import read_json

BYTES = 64 * 2**20
"""Of the weights that are measured: more than most caches hold."""
REPEATS = 5
MARGIN = 0.95
"""Packed weights are a second copy, and a float32 cache has twice the bytes: they have to take less than this share of
the time without."""


def packed_pays(n_in: int, n_out: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether inputs of `rows` rows times weights (n_out, n_in) are faster packed, on this CPU and number of threads.

    The first question takes less than a second; its answer is kept in the user's cache directory, so that equal
    commands decode with equal kernels.
    """
    n_out = min(n_out, max(16, BYTES // (n_in * dtype.itemsize)))
    return _kept(f"{n_in}x{n_out}", dtype, rows, lambda: _share(n_in, n_out, dtype, rows)) < MARGIN


def wide_cache_pays(heads: int, groups: int, width: int, n: int, keys: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether n queries of each of `rows` rows over a cache of some `keys` positions are faster in float32.

    The processor's kernel for one query multiplies bfloat16 values one by one on some machines. Kept as above.
    """
    keys, rows = 2 ** round(math.log2(keys)), min(rows, 16)
    shape = f"attention of {heads} heads to {groups} of {width}, {n} queries, {keys} keys"
    return _kept(shape, dtype, rows, lambda: _cache_share(heads, groups, width, n, keys, dtype, rows)) < MARGIN


def _kept(question: str, dtype: torch.dtype, rows: int, measure: Callable[[], float]) -> float:
    """The share of time that was measured for a question before, on this machine and number of threads, or is now."""
    key = f"{question} {str(dtype).removeprefix('torch.')}, {rows} rows, {torch.get_num_threads()} threads"
    machine = f"{device_name(torch.device('cpu'))}, torch {torch.__version__}"
    path = default_cache() / "packed_products.json"
    try:
        known = read_json(path)
    except ValueError:  # none yet, or damaged
        known = {}
    kept = known.get(machine)
    found = kept if isinstance(kept, dict) else {}
    if not isinstance(share := found.get(key), float):
        share = measure()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known | {machine: found | {key: share}})
        except OSError:  # a directory that cannot be written: measured again next time
            pass
    return share


@torch.no_grad()
def _share(n_in: int, n_out: int, dtype: torch.dtype, rows: int) -> float:
    """Time of packed products over that of plain ones: medians of passes over different weights, taken in turns."""
    count = max(1, min(16, BYTES // (n_in * n_out * dtype.itemsize)))
    weights = [torch.full((n_out, n_in), 0.01, dtype=dtype) for _ in range(count)]
    x = torch.ones(rows, n_in, dtype=dtype)
    packed: Sequence[nn.Module] = [PackedLinear(weight) for weight in weights]
    return _ratio(
        lambda: [nn.functional.linear(x, weight) for weight in weights], lambda: [linear(x) for linear in packed]
    )


@torch.no_grad()
def _cache_share(heads: int, groups: int, width: int, n: int, keys: int, dtype: torch.dtype, rows: int) -> float:
    """Time of attention over a float32 cache over that of one in `dtype`."""
    q = torch.ones(rows, heads, n, width, dtype=dtype)
    k = torch.full((rows, groups, keys, width), 0.01, dtype=dtype)
    v, wide_k, wide_v = k.clone(), k.float(), k.float()
    return _ratio(lambda: attention(q, k, v, None), lambda: attention(q.float(), wide_k, wide_v, None).to(dtype))


def _ratio(*passes: Callable[[], object]) -> float:
    """Time of the second pass over that of the first: medians, taken in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS + 1):
        for run, into in zip(passes, seconds, strict=True):
            began = time.perf_counter()
            run()
            into.append(time.perf_counter() - began)
    plain, other = (statistics.median(each[1:]) for each in seconds)  # the first pass allocates
    return other / plain
