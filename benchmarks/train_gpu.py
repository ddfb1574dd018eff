"""One training step of a large model on one GPU, in the dtypes of the sharded strategy: memory against `flashar plan`,
tokens per second, MFU, and the shares of attention, cross-entropy and optimizer.

    python benchmarks/train_gpu.py llamagen-3b --out benchmarks/results/train_llamagen_3b_gpu.json

Float32 master weights in FSDP2 units that are gathered in bfloat16, blocks recomputed in the backward pass, clipping,
AdamW: what `flashar fit` runs with ShardedStrategy, on one device. Weights, codes and prompts are random. On a CPU the
tiny models try the script; numbers mean nothing there. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from flashar_pl.backbones import build_backbone
from flashar_pl.benchmarking.measure import Timing, clock, clock_name
from flashar_pl.console import versions
from flashar_pl.devices import peak_memory
from flashar_pl.files import write_json
from flashar_pl.models import FlashAR
from flashar_pl.planner.advice import GPUS
from flashar_pl.planner.sizes import ModelSizes, model_sizes
from flashar_pl.planner.training import CONTEXT_BYTES, STAGE1, TrainingSetup, step_flops, training_memory
from flashar_pl.training.optim import adamw
from flashar_pl.training.sharded.units import allocate, local, recompute_blocks, shard


@dataclass(frozen=True)
class Job:
    """A model and its batch."""

    backbone: dict[str, Any]
    grid: tuple[int, int]
    samples: int
    moments: Literal["fp32", "bf16"]
    prefix: int = 1

    @property
    def sizes(self) -> ModelSizes:
        """FlashAR on the backbone, branched where the recipes branch."""
        return model_sizes({"backbone": self.backbone})

    @property
    def setup(self) -> TrainingSetup:
        """For the planner."""
        return TrainingSetup(self.grid, gpus=1, samples=self.samples, moments=self.moments, prefix=self.prefix)


def emu(
    dim: int, n_layer: int, heads: tuple[int, int], head_dim: int, ffn_dim: int, vocab: int, codes: int
) -> dict[str, Any]:
    """An Emu3.5 of another size, heads over visual codes only."""
    return {
        "kind": "emu35", "dim": dim, "n_layer": n_layer, "n_head": heads[0], "n_kv_head": heads[1],
        "head_dim": head_dim, "ffn_dim": ffn_dim, "vocab_size": vocab, "rope_base": 1e6, "norm_eps": 1e-6,
        "visual_token_offset": vocab - codes, "heads": "visual",
    }  # fmt: skip


JOBS = {
    "llamagen-3b": Job({"preset": "llamagen-3b"}, (24, 24), 16, "fp32"),
    "emu35-7b": Job(emu(4096, 32, (32, 8), 128, 11008, 282926, 131072), (32, 32), 4, "bf16", prefix=50),
    "tiny-llamagen": Job(
        {"kind": "llamagen", "dim": 32, "n_layer": 3, "n_head": 4, "vocab_size": 300}, (4, 4), 2, "fp32"
    ),
    "tiny-emu35": Job(emu(32, 5, (4, 2), 8, 64, 260, 200), (4, 4), 2, "bf16", prefix=5),
}
"""emu35-7b: 7.4 billion parameters in the backbone, Emu3.5's vocabulary."""


class Bench:
    """The model of a job, its optimizer and one batch."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        sizes = job.sizes
        with torch.device("meta"):
            made = build_backbone(job.backbone)
            self.model = FlashAR(made, sizes.branch_layer, sizes.vertical_layers).float()
        recompute_blocks(self.model)
        shard(self.model, init_device_mesh(device.type, (1,)), "bf16")
        allocate(self.model, device)
        torch.manual_seed(0)
        for parameter in self.model.parameters():
            with torch.no_grad():
                local(parameter).normal_(std=0.02) if parameter.ndim > 1 else local(parameter).fill_(1.0)
        self.model.train()
        self.plan = self.model.default_plan(*job.grid)
        self.codes = torch.randint(0, sizes.vocabulary, (job.samples, *job.grid)).to(device)
        self.condition = replace(sizes.conditioning, positions=job.prefix).example(job.samples).to(device)
        self.optimiser = adamw(self.model, 2e-5, state=job.moments)

    def freeze(self, stage: int) -> None:
        """What a stage does not train has neither gradients nor moments."""
        roles = self.model.roles()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(stage == 2 or roles[name] in STAGE1)
        self.optimiser.state.clear()

    def compute(self) -> None:
        """Forward, backward, clipping."""
        self.model.loss(self.codes, self.condition, self.plan)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        """The optimizer."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    def step(self) -> None:
        """Both."""
        self.compute()
        self.update()

    # --- one stage --------------------------------------------------------------------------------------------------

    def stage(self, stage: int, repeats: int, peak_flops: float | None) -> dict[str, Any]:
        """The row of a stage."""
        self.freeze(stage)
        timing = Timing()
        for i in range(repeats + 2):  # two do not count: moments, the allocator's blocks
            clock(self.step, self.device, timing if i > 1 else Timing())
        summary = timing.summary()
        seconds = summary[f"{clock_name(self.device)}_s"]
        job, planned = self.job, training_memory(self.job.sizes, self.job.setup, stage)
        once = step_flops(job.sizes, replace(job.setup, checkpointing=False), stage)
        again = step_flops(job.sizes, job.setup, stage)
        measured = self.memory()
        return {
            "stage": stage,
            "time": summary,
            "tokens_per_s": self.codes.numel() / seconds,
            "flops": once,
            "flops_with_recomputation": again,
            "mfu": None if peak_flops is None else once / seconds / peak_flops,
            "share_of_peak_with_recomputation": None if peak_flops is None else again / seconds / peak_flops,
            "planned": asdict(planned),
            "planned_without_context": planned.total - CONTEXT_BYTES,
            **measured,
            "peak_over_planned": measured["peak_bytes"] / (planned.total - CONTEXT_BYTES),
            "shares": self.shares(seconds),
        }

    def memory(self) -> dict[str, Any]:
        """Bytes of weights, gradients and moments by counting; peaks of both halves of a step."""
        with peak_memory(self.device) as first:
            self.compute()
        parameters = list(self.model.parameters())
        gradients = sum(local(p.grad).nbytes for p in parameters if p.grad is not None)
        with peak_memory(self.device) as second:
            self.update()
        states = [value for state in self.optimiser.state.values() for value in state.values()]
        counted = {
            "weights": sum(local(p).nbytes for p in parameters),
            "gradients": gradients,
            "moments": sum(local(t).nbytes for t in states if isinstance(t, Tensor) and t.ndim),
        }
        reserved = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None
        return {
            "counted": counted,
            "peak_bytes": max(first.bytes, second.bytes),
            "peak_compute_bytes": first.bytes,
            "peak_optimizer_bytes": second.bytes,
            "reserved_bytes": reserved,
        }

    def shares(self, seconds: float) -> dict[str, float]:
        """Shares of a step: cross-entropy (heads, gate and their gradients) and optimizer by the clock, over the step
        that was timed; attention (without its projections) by the profiler, of what the device did.
        """
        timings = {"cross_entropy": Timing(), "optimizer": Timing()}
        with self._clocked(timings["cross_entropy"]):
            self.compute()
        clock(self.update, self.device, timings["optimizer"])
        name = clock_name(self.device)
        found = {part: sum(getattr(timing, name)) / seconds for part, timing in timings.items()}
        return {"attention": self.attention_share(), **found}

    @contextmanager
    def _clocked(self, timing: Timing) -> Iterator[None]:
        """Time every call of the loss of the heads."""
        losses = self.model.dual_head.losses
        self.model.dual_head.losses = lambda *args: clock(lambda: losses(*args), self.device, timing)  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.model.dual_head.losses = losses  # type: ignore[method-assign]

    def attention_share(self) -> float:
        """Time inside the attention operators, forward (twice: recomputed) and backward, over that of all work."""
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
            self.step()
            if cuda:
                torch.cuda.synchronize(self.device)
        inside = total = 0.0
        for event in trace.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            fused = event.key.startswith("aten::_scaled_dot_product_") and not on_device
            if cuda:
                inside += event.device_time_total if fused else 0.0
                total += event.self_device_time_total if on_device and not event.is_user_annotation else 0.0
            else:
                inside += event.cpu_time_total if fused else 0.0
                total += event.self_cpu_time_total
        return inside / total


def peak_flops(device: torch.device) -> float | None:
    """Published bfloat16 rate of the GPU, by its name; None if it is not in the planner's table."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), None)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--samples", type=int, help="samples of a step (default: the job's)")
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", help="also write the JSON to this new file")
    options = parser.parse_args(words)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    job = JOBS[options.job]
    if options.samples is not None:
        job = replace(job, samples=options.samples)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        bench = Bench(job, device)
        stages = [int(stage) for stage in options.stages.split(",")]
        rows = [bench.stage(stage, options.repeats, peak_flops(device)) for stage in stages]
    finally:
        dist.destroy_process_group()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": vars(options),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": job.sizes.parameters(),
        "setup": asdict(job.setup),
        "peak_flops": peak_flops(device),
        "rows": rows,
        "versions": versions(),
    }
    if options.out:
        write_json(Path(options.out), result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
