"""Where the time of decoding goes: time by kind of operation, from torch.profiler.

    python benchmarks/profile_decode.py --preset llamagen-b --plan diagonal --dtype fp32
    python benchmarks/profile_decode.py --preset llamagen-l --plan diagonal --dtype bf16 --device cuda

On a CPU the processor time of one thread, on a GPU the time of the kernels; both with the eager runner, whose kernels a
CUDA graph replays. The profiler slows every operation down; shares are what counts, not the total.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date

import torch
from torch.profiler import ProfilerActivity, profile

from flashar_pl.benchmarking.subjects import Subject
from flashar_pl.console import table
from flashar_pl.decoding import Engine
from flashar_pl.decoding.build import choose_format
from flashar_pl.decoding.prepare import prepare
from flashar_pl.devices import device_name
from flashar_pl.numerics import dtype_from_name
from flashar_pl.options import EngineOptions, PresetOptions

KINDS = (
    ("attention", ("attention", "sdpa", "flash", "fmha")),
    (
        "matrix products",
        (
            "aten::addmm",
            "aten::mm",
            "aten::linear",
            "aten::bmm",
            "mkldnn",
            "aten::_weight",
            "gemm",
            "gemv",
            "cutlass",
            "nvjet",
            "splitK",
        ),
    ),
    ("drawing", ("softmax", "cumsum", "searchsorted", "topk", "sort", "argmax", "aten::lerp", "scan", "lerp")),
    ("moving data", ("copy", "cat", "index", "embedding", "fill", "empty", "clone", "to_copy", "scatter", "gather")),
)


def kind(name: str) -> str:
    """The kind of an operation; everything else is element-wise work: norms, RoPE, SwiGLU, residuals, guidance."""
    for label, words in KINDS:
        if any(word in name for word in words):
            return label
    return "element-wise, views"


def main() -> None:
    """Profile one image with guidance 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llamagen-b")
    parser.add_argument("--plan", default="diagonal")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--grid", default="16x16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weight-format", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    subject = Subject.of(PresetOptions(arguments.preset, grid=arguments.grid), device)
    model = subject.model(device, dtype_from_name(arguments.dtype))
    form = EngineOptions(runner="eager", weight_format=arguments.weight_format)
    engine = Engine(prepare(model, choose_format(model, form, arguments.plan)), "eager")
    condition, unconditional = subject.condition(arguments.batch_size, True)

    def decode() -> None:
        guidance = {"cfg_scale": 2.0, "unconditional": unconditional}
        engine.generate(condition, subject.grid, arguments.plan, seeds=0, **guidance).cpu()

    decode()
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        decode()
    shares: dict[str, float] = {}
    calls = 0
    for event in trace.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        shares[kind(event.key)] = shares.get(kind(event.key), 0.0) + spent
        calls += event.count
    total = sum(shares.values())
    lines = [
        [name, f"{1e-3 * time:.0f}", f"{time / total:.1%}"]
        for name, time in sorted(shares.items(), key=lambda x: -x[1])
    ]
    print(f"{date.today()}, {device_name(device)}, torch {torch.__version__}; {' '.join(sys.argv)}\n")
    print(table(("kind", "ms", "share"), lines))
    print(f"\n{calls} operations")


if __name__ == "__main__":
    main()
