"""Where the time of decoding goes: processor time by kind of operation, from torch.profiler.

    python benchmarks/profile_decode.py --preset llamagen-b --plan diagonal --dtype fp32

The profiler slows every operation down; shares are what counts, not the total. One thread.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from flashar_pl.commands.benchmark_rows import synthetic_condition, synthetic_model
from flashar_pl.commands.benchmark_table import markdown
from flashar_pl.decoding import generate
from flashar_pl.numerics import dtype_from_name
from flashar_pl.planner import model_sizes

KINDS = (
    ("matrix products", ("aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "mkldnn", "aten::_weight")),
    ("attention", ("attention", "sdpa")),
    ("drawing", ("softmax", "cumsum", "searchsorted", "topk", "sort", "argmax", "aten::lerp")),
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = model_sizes({"backbone": {"preset": arguments.preset}})
    model = synthetic_model(sizes, torch.device("cpu"), dtype_from_name(arguments.dtype))
    condition, _ = synthetic_condition(sizes, arguments.batch_size, True)

    def decode() -> None:
        generate(model, condition, (16, 16), arguments.plan, cfg_scale=2.0, seeds=0)

    decode()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        decode()
    shares: dict[str, float] = {}
    calls = 0
    for event in trace.key_averages():
        shares[kind(event.key)] = shares.get(kind(event.key), 0.0) + event.self_cpu_time_total
        calls += event.count
    total = sum(shares.values())
    lines = [
        [name, f"{1e-3 * time:.0f}", f"{time / total:.1%}"]
        for name, time in sorted(shares.items(), key=lambda x: -x[1])
    ]
    print(markdown(("kind", "ms", "share"), lines))
    print(f"\n{calls} operations")


if __name__ == "__main__":
    main()
