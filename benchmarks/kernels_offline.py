"""Compile the kernels of runner `fused` for GPUs that are not here: registers, spills, widths of loads.

    python benchmarks/kernels_offline.py --out benchmarks/results/kernels_offline.json

The launches are those of real models, decoded on the meta device. Needs Triton (and its ptxas), no GPU. Exit code 1 if
a kernel spills registers, or reads weights in less than 128 bits at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashar_pl.backbones.registry import build_backbone, presets
from flashar_pl.decoding.fused import decode_fused
from flashar_pl.decoding.loop import Buffers, Inputs
from flashar_pl.files import write_json
from flashar_pl.layers.kernels.launch import Launch, watched
from flashar_pl.layers.rounded import BYTES, rounded_product
from flashar_pl.models import FlashAR
from flashar_pl.options import SamplingSettings

TARGETS = (80, 90)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16",
         torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
         torch.float8_e4m3fn: "fp8e4nv"}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NARROW = {"choose"}
"""Kernels that read logits and draw, no weights."""


def launches(preset: str, plan_name: str, grid: tuple[int, int], batch: int, **sampling: Any) -> list[Launch]:
    """Of a guided decoding of `batch` samples in bfloat16."""
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone({"kind": presets()[preset].kind, "preset": preset})
        model = FlashAR(backbone, backbone.n_layer - (backbone.usual_clones or 1)).to(torch.bfloat16).eval()
        plan, settings = model.make_plan(plan_name, *grid), SamplingSettings(cfg_scale=2.0, **sampling)
        rows, kind = 2 * batch, backbone.conditioning.kind
        ids = [torch.zeros(30, dtype=torch.int64)] * rows if kind == "prompt" else torch.zeros(rows, dtype=torch.int64)
        prefix = model.prefix(backbone.check_condition(ids) if kind == "class" else ids)
        inputs = Inputs(prefix, model.rope(plan, prefix, True), torch.zeros(batch, plan.n_cells, dtype=torch.float64))
        with watched() as found:
            for _ in decode_fused(model, plan, settings, inputs, Buffers.allocate(model, plan, inputs)):
                pass
    return found


def rounded_launches(rows: int, rounding: str) -> list[Launch]:
    """The largest product of the 34B with weights of one byte."""
    n, k = 2 * 25600, 5120
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="meta")
    q = torch.empty(n, k, dtype=BYTES[rounding][0], device="meta")
    with watched() as found:
        rounded_product(x, q, torch.empty(n, device="meta"), None)
    return found


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any], tuple[Any, ...]]:
    """What Triton compiles for a launch, its options, and a key that is equal where that is."""
    kernel, signature, attributes = launch.kernel, {}, {}
    names = kernel.arg_names
    for i, (name, value) in enumerate(zip(names, launch.arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.options.items() if name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in launch.options.items() if name not in options}
    signature |= dict.fromkeys(constants, "constexpr")
    key = (launch.name, str(signature), str(attributes), str(constants), str(options))
    return ASTSource(kernel, signature, constants, attributes), options, key


def compiled(launch: Launch, target: int) -> dict[str, Any]:
    """Registers, spills, shared memory and widest loads of a launch on compute capability `target` / 10."""
    made, options, _ = source(launch)
    built = triton.compile(made, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])

        def tool(option: str) -> str:
            done = subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True)
            return done.stdout

        usage, sass = tool("--dump-resource-usage"), tool("--dump-sass")
    count = Counter(re.findall(r"\b(LDL|STL|LDGSTS\.E[\w.]*128|LDG\.E[\w.]*128|HGMMA|HMMA)\b", sass))
    constants = {name: value for name, value in launch.options.items() if name not in options and name != "ACC"}
    return {
        "kernel": launch.name,
        "sm": target,
        "constants": constants | options,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": count["LDL"] + count["STL"],
        "shared_bytes": built.metadata.shared,
        "loads_128": sum(n for name, n in count.items() if "128" in name),
        "tensor_products": count["HGMMA"] + count["HMMA"],
    }


def git_commit() -> str:
    """Of the checkout."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


JOBS: tuple[tuple[Any, ...], ...] = (
    ("llamagen-l", "diagonal", (16, 16), 1),
    ("llamagen-l", "raster", (16, 16), 1),
    ("llamagen-l", "diagonal", (16, 16), 64),
    ("llamagen-xxl", "diagonal", (16, 16), 1),
    ("emu35-34b", "diagonal", (32, 32), 1),
    ("emu35-34b", "raster", (32, 32), 1),
)
"""Preset, plan, grid, batch."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--jobs", type=int, default=len(JOBS), help="only the first so many models; 0: weights of one byte alone"
    )
    parser.add_argument("--sm", type=int, nargs="*", default=list(TARGETS), help="compute capabilities times ten")
    given = parser.parse_args()
    found: dict[Any, tuple[Launch, set[str]]] = {}
    for number, (preset, plan, grid, batch) in enumerate(JOBS[: given.jobs]):
        filters = {"top_k": 2000, "top_p": 0.9} if number == 0 else {}
        for each in launches(preset, plan, grid, batch, **filters):
            found.setdefault(source(each)[2], (each, set()))[1].add(f"{preset} {plan} batch {batch}")
    for rows_of_x, rounding in ((2, "int8"), (64, "int8"), (256, "int8"), (2, "fp8"), (64, "fp8"), (256, "fp8")):
        for each in rounded_launches(rows_of_x, rounding) if given.jobs in (0, len(JOBS)) else ():
            found[source(each)[2]] = (each, {f"{rounding} weights, {rows_of_x} rows"})
    rows = []
    for each, models in found.values():
        for target in given.sm:
            if target < 89 and any("fp8" in name for name in models):
                continue  # has no float8
            rows.append(compiled(each, target) | {"models": sorted(models)})
            print({name: rows[-1][name] for name in ("kernel", "sm", "registers", "spills", "loads_128")}, flush=True)
    bad = [row for row in rows if row["spills"] or (not row["loads_128"] and row["kernel"] not in NARROW)]
    for row in bad:
        print("NOT AS IT SHOULD BE:", row)
    if given.out is not None:
        write_json(given.out, {"triton": triton.__version__, "commit": git_commit(), "rows": rows})
    print(f"{len(rows)} compiled, {len(bad)} with spills or narrow loads")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
