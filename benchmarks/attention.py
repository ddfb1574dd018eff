"""Attention of training, forward and backward, by the forms that the plans allow: which one to use at which length.

    python benchmarks/attention.py --device cuda --out benchmarks/results/attention_gpu.json

Forms:
- mask: the package's own `attention` with the bool mask of the diagonal plan: queries that share a key are rows of one
  head, odd head widths are padded.
- bias: `scaled_dot_product_attention` with the same as an additive mask in the compute dtype, its rows padded to a
  multiple of 8 beforehand.
- flex: compiled `flex_attention` with a block mask of the same plan, built once, which `CompileBlocks` trains with on
  a GPU. It has no backward pass on a CPU.
- causal: `scaled_dot_product_attention` with is_causal, what the raster plan runs: a bound for the others.

The last line printed is JSON: for every shape and form the time of a forward, and of forward and backward, the memory
and the largest difference from the form "mask"; or why a form did not run.

Shapes: R rows, A query heads, G key/value heads, K positions, E head width.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.backbones.base import plan_mask
from flashar_pl.benchmarking.measure import Timing, clock, clock_name
from flashar_pl.console import versions
from flashar_pl.devices import peak_memory
from flashar_pl.files import write_json
from flashar_pl.grid import DecodePlan, diagonal_plan
from flashar_pl.layers.flex import BlockedMask, blocks_of
from flashar_pl.layers.transformer import attention
from flashar_pl.numerics import dtype_from_name

FORMS = ("mask", "bias", "flex", "causal")


@dataclass(frozen=True)
class Shape:
    """One attention layer of a training step."""

    name: str
    rows: int
    heads: int
    kv_heads: int
    width: int
    side: int
    """H = W of the code grid."""
    prefix: int

    @property
    def plan(self) -> DecodePlan:
        """Of the grid."""
        return diagonal_plan(self.side, self.side)

    @property
    def length(self) -> int:
        """K: the prefix and every slot, one more than training feeds."""
        return self.prefix + self.plan.n_slots


SHAPES = (
    Shape("llamagen-l 256 px", 64, 16, 16, 64, 16, 1),
    Shape("llamagen-3b 384 px", 16, 32, 32, 100, 24, 1),
    Shape("llamagen-xl-t2i 512 px", 8, 20, 20, 64, 32, 120),
    Shape("emu35-34b 32x32", 4, 64, 8, 128, 32, 80),
)
TINY = (Shape("tiny", 2, 4, 2, 16, 4, 3),)


def function(form: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """(q (R, A, K, E), k, v (R, G, K, E)) -> (R, A, K, E), with its mask made beforehand."""
    gqa, length = shape.heads != shape.kv_heads, shape.length
    if form == "causal":
        return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=gqa)
    mask = plan_mask(shape.plan, shape.prefix, shape.plan.n_slots, device)  # (K, K)
    if form in ("mask", "flex"):
        from torch.nn.attention.flex_attention import flex_attention

        given = mask[None, None] if form == "mask" else BlockedMask(torch.compile(flex_attention), blocks_of(mask))
        return lambda q, k, v: attention(q, k, v, given).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
    bias = torch.full((length, -(-length // 8) * 8), -torch.inf, dtype=dtype, device=device)[:, :length]
    return partial(F.scaled_dot_product_attention, attn_mask=bias.masked_fill_(mask, 0.0), enable_gqa=gqa)


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, as leaves with gradients."""
    torch.manual_seed(0)
    size = (shape.rows, shape.length, shape.heads + 2 * shape.kv_heads, shape.width)
    parts = torch.randn(size, device=device).to(dtype).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in parts)  # strided like a joint projection
    return q, k, v


def measure(form: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row of the result. A form that cannot run here says why."""
    q, k, v = inputs(shape, device, dtype)
    row: dict[str, Any] = {"shape": shape.name, "length": shape.length, "form": form}
    torch.compiler.reset()  # beyond 8 compiled forms of a function torch runs it eagerly

    plain = [leaf.detach() for leaf in (q, k, v)]

    def forward() -> Tensor:
        return attend(*plain)

    def both() -> None:
        for leaf in (q, k, v):
            leaf.grad = None
        attend(q, k, v).backward(q.detach())

    try:
        attend = function(form, shape, device, dtype)
        if form != "causal":
            expected = function("mask", shape, device, dtype)(*plain)
            row["difference"] = float((forward().float() - expected.float()).abs().max())
        row["forward"] = timed(forward, device, repeats)
        row["both"] = timed(both, device, repeats)
        with peak_memory(device) as peak:
            both()
        row["extra_bytes"] = peak.extra
    except (RuntimeError, ValueError) as error:
        row["not_run"] = str(error).splitlines()[0][:200]
    return row


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median of a few runs after two that do not count (one compiles)."""
    timing = Timing()
    for i in range(repeats + 2):
        clock(call, device, timing if i > 1 else Timing())
    summary = timing.summary()
    return {**summary, "seconds": summary[f"{clock_name(device)}_s"]}


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure every form at every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rows", type=int, help="rows of every shape (default: as a training step has)")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the script")
    parser.add_argument("--out", help="also write the JSON to this new file")
    options = parser.parse_args(words)
    device, dtype = torch.device(options.device), dtype_from_name(options.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    for shape in TINY if options.tiny else SHAPES:
        given = shape if options.rows is None else Shape(**{**asdict(shape), "rows": options.rows})
        rows += [measure(form, given, device, dtype, options.repeats) for form in options.forms.split(",")]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": vars(options),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread",
        "clock": clock_name(device),
        "shapes": [asdict(shape) for shape in (TINY if options.tiny else SHAPES)],
        "rows": rows,
        "versions": versions(),
    }
    if options.out:
        write_json(Path(options.out), result)
    print(json.dumps(result, allow_nan=False))
    return result


if __name__ == "__main__":
    main()
