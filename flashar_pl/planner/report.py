"""What `flashar plan` prints."""

from __future__ import annotations

from typing import Any

from flashar_pl.console import table

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "8bit": "8-bit"}


def report(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    setup, gpu, time, memory = result["setup"], result["gpu"], result["time"], result["memory"]
    counts = {role: count for role, count in result["parameters"].items() if count}
    total = sum(counts.values())
    kind = "FSDP2" if setup["sharded"] else "DDP" if setup["gpus"] > 1 else "one GPU"
    state = f"{DTYPES[setup['moments']]} moments" + (" and shards in CPU memory" if setup["offload"] else "")
    if setup["lora"] is not None:
        counts["trained"] = total - counts["backbone"]
        state += f", frozen {DTYPES[setup['lora']['base']]} backbone with LoRA of rank {setup['lora']['rank']}"
    counts["total"] = total
    flops = ", ".join(f"{stage} {count / 1e12:.1f} TF" for stage, count in time["step_flops_per_gpu"].items())
    text = [
        f"{result['config']}: {setup['gpus']} GPU(s), {kind}, {setup['samples']} sample(s) per GPU and forward, "
        f"{setup['accumulate']} forward(s) per step, "
        f"{state}, {'with' if setup['checkpointing'] else 'without'} activation checkpointing, "
        f"grid {setup['grid'][0]}x{setup['grid'][1]}",
        *(f"note: {note}" for note in result["notes"]),
        table(("parameters", "number"), [[role, f"{count:,}"] for role, count in counts.items()]),
        table(
            ("GB per GPU", *memory),
            [[name, *(f"{stage[name] / 1e9:.2f}" for stage in memory.values())] for name in memory["stage2"]],
        ),
        _verdict(result),
        f"FLOPs per GPU and step: {flops}; "
        f"{setup['total_steps']:,} steps take {time['hours']:.1f} h, {time['gpu_hours']:.0f} GPU-hours, at "
        f"{result['mfu']:.0%} of {gpu['flops'] / 1e12:.0f} TFLOP/s ({gpu['name']})",
        _decoding(result["decode"], gpu["name"]),
    ]
    return "\n\n".join(text)


def _decoding(plans: list[dict[str, Any]], gpu: str) -> str:
    """Floors, and what is predicted where it is."""
    head = ["plan", "steps", "GB moved", "TFLOP", f"floor ms ({gpu})", "GB needed"]
    rows = [
        [
            *(each["plan"], str(each["steps"]), f"{each['bytes'] / 1e9:.1f}", f"{each['flops'] / 1e12:.2f}"),
            *(f"{1e3 * each['floor_s']:.1f}", f"{each['memory'] / 1e9:.1f}"),
        ]
        for each in plans
    ]
    n = max((each["devices"] for each in plans), default=1)
    shared = f" by {n} devices that share the model, numbers of each" if n > 1 else ""
    title = f"decoding one guided image in bfloat16{shared}"
    runners = [each["runner"] for each in plans if "runner" in each]
    if runners:
        title += f"; runner {runners[0]}, milliseconds predicted, low / central / high (no GPU has confirmed them)"
        head += ["kernels", "graphs MB", "predicted ms"]
        for row, each in zip(rows, plans):
            row += ["-", "-", "-"] if "runner" not in each else [
                f"{each['kernels']:,}", " / ".join(f"{size / 1e6:.0f}" for size in each["graph_bytes"]),
                " / ".join(f"{1e3 * seconds:.1f}" for seconds in each["predicted_s"]),
            ]  # fmt: skip
    return f"{title}:\n\n" + table(head, rows)


def _verdict(result: dict[str, Any]) -> str:
    """Whether it fits, and what would."""
    gpu = result["gpu"]
    peak = max(stage["total"] for stage in result["memory"].values())
    room = f"{gpu['usable'] / 1e9:.1f} of {gpu['memory'] / 1e9:.0f} GB"
    host = result["host_bytes_per_process"]
    extra = f" CPU memory: {host / 1e9:.1f} GB per process." if host else ""
    if result["fits"]:
        return f"fits: {peak / 1e9:.1f} GB of {room} (the rest for fragmentation).{extra}"
    advice = [f"{text}: {total / 1e9:.1f} GB" for text, total in result["changes"]]
    if result["gpus_that_fit"]:
        advice.append(f"{result['gpus_that_fit']} GPUs with FSDP2")
    tips = "\n".join(f"- {tip}" for tip in advice) or "- larger GPUs: no change of this run is enough"
    return f"does NOT fit: {peak / 1e9:.1f} GB, and {room} can be used.{extra} What would fit:\n{tips}"
