"""Measurements that turn the planner's bytes and FLOPs into seconds: device rates, the GEMMs of a job alone, clocks.

Wall time says what a user waits for. On a CPU that others use too, processor time is steadier; both are kept.

Letters: R rows, n slots of a step, D width.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.console import versions
from flashar_pl.devices import device_name
from flashar_pl.layers.rounded import RoundedLinear, Rounding
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.planner.decode import DecodeJob, Gemm
from flashar_pl.planner.sizes import TEXT


@dataclass
class Timing:
    """Repeated measurements in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Processor time of all threads; what counts on a CPU, meaningless on a GPU."""

    def summary(self) -> dict[str, Any]:
        """Median, interquartile range, mean and its standard error (None = measured once) of both clocks."""
        found: dict[str, Any] = {"repeats": len(self.wall)}
        for name, values in (("wall", self.wall), ("cpu", self.cpu)):
            low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
            error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
            found |= {f"{name}_s": middle, f"{name}_iqr_s": high - low}
            found |= {f"{name}_mean_s": float(np.mean(values)), f"{name}_standard_error_s": error}
        return found


def clock(call: Callable[[], Any], device: torch.device, into: Timing) -> Any:
    """Run `call` on an idle device until the device has finished, and add its time.

    On a GPU, wall time is that between two events on its stream: the waits around them are not counted, which matter
    where a call takes a tenth of a millisecond.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream, cpu = torch.cuda.current_stream(device), time.process_time()
        began.record(stream)
        result = call()
        ended.record(stream)
        ended.synchronize()
        into.wall.append(1e-3 * began.elapsed_time(ended))
    else:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        into.wall.append(time.perf_counter() - wall)
    into.cpu.append(time.process_time() - cpu)
    return result


def clock_name(device: torch.device) -> Literal["wall", "cpu"]:
    """The clock that ratios use: processor time for one thread of a CPU, which other processes hardly disturb."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def circumstances(device: torch.device, threads: int) -> dict[str, Any]:
    """When, where and with what something is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": threads if device.type == "cpu" else None,
        "clock": clock_name(device),
        "versions": versions(),
    }


@contextmanager
def cpu_threads(device: torch.device, threads: int) -> Iterator[None]:
    """Runs the block with so many CPU threads; on a GPU nothing changes."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads if device.type == "cpu" else before)
        yield
    finally:
        torch.set_num_threads(before)


def repeats_for(seconds: float, wanted: int | None) -> int:
    """How often to measure something that takes `seconds`: as wanted; None = 10 times, 3 above 5 s, once above 20 s."""
    return wanted or (10 if seconds <= 5 else 3 if seconds <= 20 else 1)


# --- device ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What a device does at best, in the sizes of one model."""

    copy: float
    """Bytes per second read plus written by a copy as large as one forward's weights."""
    read: float
    """Bytes per second read by a sum over as many."""
    matrix: float
    """FLOP per second of the model's largest projection with many rows."""

    @property
    def bandwidth(self) -> float:
        """The faster of copying and reading: decoding mostly reads."""
        return max(self.copy, self.read)


@torch.no_grad()
def device_speed(job: DecodeJob, device: torch.device, rounding: Rounding | None = None) -> Speed:
    """Measured rates. The buffers are as large as the weights of one forward, so that caches help both alike.

    rounding: of the weights in the product with many rows.
    """
    size = max(2**20, min(job.forwards[-1].weight_bytes, 4 * 2**30)) // 4 * 4
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / best(partial(target.copy_, source), device)
    read = size / best(source.sum, device)
    linear = max(job.sizes.linears, key=lambda each: each.parameters)
    rows = 4096 if device.type == "cuda" else 512
    x = torch.randn(rows, linear.n_in, dtype=job.dtype, device=device)  # equal numbers take less power, so less time
    weight = torch.randn(linear.n_out, linear.n_in, dtype=job.dtype, device=device)
    product = partial(F.linear, weight=weight) if rounding is None else RoundedLinear(weight, None, rounding)
    matrix = 2 * rows * linear.parameters / best(partial(product, x), device)
    return Speed(copy, read, matrix)


def best(call: Callable[[], Any], device: torch.device) -> float:
    """Shortest time of seven runs after one that does not count, on the clock of `clock_name`."""
    timing = Timing()
    for _ in range(8):
        clock(call, device, timing)
    return min(getattr(timing, clock_name(device))[1:])


# --- the GEMMs of a job alone -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A matrix product that the model runs, by the kernel that it uses."""

    n_in: int
    n_out: int
    dtype: torch.dtype
    """Of the input."""
    run: Callable[[Tensor], Tensor]
    """(R, n_in) -> (R, n_out)."""

    @classmethod
    def of(cls, module: nn.Module, first_row: int = 0) -> Projection:
        """Of a linear, from an output on; of another module that has in_features and dtype, all outputs."""
        if isinstance(module, nn.Linear):
            weight = module.weight[first_row:] if first_row else module.weight
            return cls(weight.shape[1], weight.shape[0], weight.dtype, _product(weight))
        return cls(module.in_features, module.out_features, module.dtype, module)  # type: ignore[arg-type]


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x W^T."""
    return lambda x: F.linear(x, weight)


class GemmWalk:
    """Runs exactly the linears of a job, with the model's own weights and kernels and the rows of each forward."""

    def __init__(self, model: GridModel, job: DecodeJob) -> None:
        self.job = job
        self.device = model.device
        blocks = list(model.backbone.blocks)
        if job.order.has_vertical and isinstance(model, FlashAR):
            blocks += [block for branch in model.branches for block in branch.blocks]
        of_condition = model.backbone.condition_linears()
        linears = [
            (name, m)
            for block in blocks
            for name, m in block.named_modules()
            if hasattr(m, "in_features") and hasattr(m, "out_features") and m not in set(of_condition.values())
        ]
        self.blocks = [Projection.of(m) for name, m in linears if TEXT not in name]  # as they run
        self.of_text = [Projection.of(m) for name, m in linears if TEXT in name]
        """What runs on the prefix alone."""
        head = model.dual_head
        heads = [linear for linear in (head.horizontal, head.vertical) if linear is not None]
        self.others = {name: [Projection.of(linear)] for name, linear in of_condition.items()}
        self.others["head"] = [Projection.of(linear, head.first_code) for linear in heads]
        if head.gate is not None:
            weight = head.gate.hidden.weight.float()  # as the gate itself does
            self.others["gate"] = [Projection(weight.shape[1], weight.shape[0], weight.dtype, _product(weight))]
        self.inputs: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def calls(self, gemms: tuple[Gemm, ...]) -> list[tuple[Tensor, Projection]]:
        """Input and matrix product of every linear of a forward."""
        others = {name: iter(found) for name, found in self.others.items()}
        text = [gemm.linear.name for gemm in gemms].count("w13") > 1
        pairs = [(gemms[0].rows, each) for each in self.blocks + self.of_text * text]
        pairs += [(gemm.rows, next(others[gemm.linear.name])) for gemm in gemms if gemm.linear.name in others]
        planned = sum(gemm.rows * gemm.linear.parameters * gemm.count for gemm in gemms)
        assert sum(rows * each.n_in * each.n_out for rows, each in pairs) == planned
        for rows, each in pairs:
            if (key := (rows, each.n_in, each.dtype)) not in self.inputs:
                self.inputs[key] = torch.randn(rows, each.n_in, dtype=each.dtype, device=self.device)
        return [(self.inputs[rows, each.n_in, each.dtype], each) for rows, each in pairs]

    @torch.no_grad()
    def measure(self, samples: int = 3) -> Timing:
        """Time of all GEMMs of the job, `samples` times: count times one measured walk, over the kinds of forwards.

        A kind that makes up more than a tenth of the job is walked ten times for each sample.
        """
        total = Timing([0.0] * samples, [0.0] * samples)
        for gemms, count in Counter(forward.gemms for forward in self.job.forwards).items():
            walk = self.runner(gemms)
            walk()
            inner = 10 if count > len(self.job.forwards) / 10 else 1
            for i in range(samples):
                timing = Timing()
                for _ in range(inner):
                    clock(walk, self.device, timing)
                total.wall[i] += count * statistics.median(timing.wall)
                total.cpu[i] += count * statistics.median(timing.cpu)
        return total

    @torch.no_grad()
    def runner(self, gemms: tuple[Gemm, ...]) -> Callable[[], Any]:
        """A function that runs a forward's linears; on a GPU one CUDA graph, so that no launch is counted."""
        calls = self.calls(gemms)

        @torch.no_grad()
        def walk() -> None:
            for x, projection in calls:
                projection.run(x)

        if self.device.type != "cuda":
            return walk
        walk()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            walk()
        return graph.replay
