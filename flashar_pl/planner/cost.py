"""Predicted milliseconds of decoding one batch on a GPU: kernels counted on the meta device, and a table of constants.

Unconfirmed: no GPU has run this package. Kernels are the operators that the decoding loop dispatches, without views
and allocations; `F.rms_norm` and attention are one each, as on a GPU. Letters: see `flashar_pl.planner.decode`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from flashar_pl.backbones.condition import Prefix
from flashar_pl.checkpoints.description import build_on_meta
from flashar_pl.decoding.fused import Fused, refusal
from flashar_pl.decoding.loop import Buffers, Inputs, decode
from flashar_pl.layers.kernels.launch import watched
from flashar_pl.layers.torch_private import DispatchMode
from flashar_pl.models.base import GridModel
from flashar_pl.options import SamplingSettings
from flashar_pl.planner.advice import Gpu
from flashar_pl.planner.decode import DecodeJob, Forward

PlannedRunner = Literal["graphs", "fused", "eager"]

OPERATORS: dict[str, tuple[float, float, float]] = {
    "gap": (0.9e-6, 1.2e-6, 1.6e-6),  # s between two kernels of a graph; others report 1.3 us on an H100
    "launch": (5e-6, 8e-6, 12e-6),  # s of the host for each kernel without graphs
    "small": (0.8e-6, 1.1e-6, 1.6e-6),  # s, execution of an element-wise kernel, a copy or a norm
    "product": (2.2e-6, 3.2e-6, 4.5e-6),  # s, least execution of a matrix product
    "attention": (3.5e-6, 4.5e-6, 6e-6),  # s, least execution of attention
    "tile": (0.6e-6, 0.9e-6, 1.4e-6),  # s for 64 keys where a mask allows no split of the keys
    "scan": (1.3e-6, 2e-6, 3e-6),  # s for 1,024 codes of a cumulative sum: few rows, each by one block
    "product_bandwidth": (0.80, 0.72, 0.63),  # reached share of the data sheet's bytes/s
    "attention_bandwidth": (0.60, 0.54, 0.48),
    "product_rate": (0.72, 0.64, 0.52),  # reached share of the data sheet's FLOP/s
    "attention_rate": (0.25, 0.20, 0.15),
    "collective": (8e-6, 12e-6, 20e-6),  # s, least execution of an all-reduce or all-gather of a few GPUs, by NVLink
    "link_bandwidth": (0.80, 0.70, 0.55),  # reached share of the data sheet's bytes/s between GPUs
    "node": (5e3, 10e3, 20e3),  # bytes of a kernel in a graph; 10 KB is reported by others
}
"""(low, central, high) of the operators of torch; the shares hold for an H200 (4.3 of 4.8 TB/s, 790 of 989 TFLOP/s)."""
OWN: dict[str, tuple[float, float, float]] = OPERATORS | {
    "product": (1.6e-6, 2.2e-6, 3.2e-6),
    "attention": (2e-6, 2.5e-6, 4.5e-6),
    "product_bandwidth": (0.80, 0.77, 0.63),
}
"""Of the own kernels."""
MASK_KERNELS = 5
"""By which attention makes its bias of a bool mask: two fills, a choice, and two that pad it."""


@dataclass(frozen=True)
class Kernels:
    """What one forward starts."""

    total: int
    attention: int
    masked: int
    """Of these, with a mask."""
    scans: int
    """Cumulative sums over the codes; the own kernel that draws walks them likewise."""
    own: int
    """Own kernels, `flashar_pl.layers.kernels`."""


class _Counting:
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted


class _Functions(_Counting, TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.rms_norm:
            self.counted["norm"] += 1
            return torch.empty_like(args[0])
        if function is torch.nn.functional.scaled_dot_product_attention:
            masked = (kwargs or {}).get("attn_mask") is not None
            self.counted["masked" if masked else "attention"] += 1
            self.counted["bias"] += MASK_KERNELS * masked
            q, v = args[0], args[2]
            return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        return function(*args, **(kwargs or {}))


class _Operators(_Counting, DispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        view = function.is_view
        moved = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_meta  # a plan's constants, once
        if not view and not moved and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.counted["scan" if name.startswith("cumsum") else "operator"] += 1
        return function(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> Kernels:
    """The kernels that `run`, on the meta device, would start on a GPU."""
    counted: Counter[str] = Counter()
    with torch.no_grad(), watched() as launches, _Functions(counted), _Operators(counted):
        run()
    masked = counted["masked"]
    attention = masked + counted["attention"] + sum(each.name == "attend" for each in launches)
    scans = counted["scan"] + sum(each.name == "choose" for each in launches)
    return Kernels(counted.total() + len(launches), attention, masked, scans, len(launches))


def _on_meta(job: DecodeJob) -> tuple[GridModel, SamplingSettings, Inputs, Buffers]:
    """The job's model without weights, and inputs without values; of prompts some are shorter, so there is a mask."""
    model = build_on_meta(job.sizes.config).to(job.dtype).eval().requires_grad_(False)
    settings, order = SamplingSettings(cfg_scale=2.0 if job.guided else 1.0), job.order
    length, rows = job.calls[0][0], job.rows
    with torch.device("meta"):
        prompts = job.sizes.backbone.conditioning.kind == "prompt" and job.guided
        mask = torch.empty(rows, length, dtype=torch.bool) if prompts else None
        x = torch.empty(rows, length, job.sizes.dim, dtype=job.dtype)
        prefix = Prefix(x, torch.empty(rows, dtype=torch.int64), mask)
        noise = torch.empty(job.batch, order.n_cells, dtype=torch.float64)
        inputs = Inputs(prefix, model.rope(order, prefix, job.guided), noise)
        return model, settings, inputs, Buffers.allocate(model, order, inputs)


def kernels_of_steps(job: DecodeJob) -> list[Kernels]:
    """Of every forward by torch's operators, one by one. From its second row on a raster plan repeats itself."""
    model, settings, inputs, buffers = _on_meta(job)
    steps = decode(model, job.order, settings, inputs, buffers)
    few = job.order.width + 1 if job.plan == "raster" else job.order.n_steps
    found = [count(lambda: next(steps)) for _ in range(min(few, job.order.n_steps))]
    return [found[t if t < few else 1 + (t - 1) % (few - 1)] for t in range(job.order.n_steps)]


def kernels_of_kinds(job: DecodeJob) -> tuple[list[Kernels], int]:
    """Of every forward by the own kernels, and the nodes of all graphs: one for the prefix, one for a kind of step.

    Raises:
        ValueError: the kernels cannot decode with this model.
    """
    model, settings, inputs, buffers = _on_meta(job)
    if reason := refusal(model):
        raise ValueError(f"--runner fused cannot be planned: {reason}. Choose --runner graphs or eager.")
    with torch.device("meta"):
        fused = Fused(model, job.order, settings, inputs, buffers)
    prefix, of_kind = count(fused.begin), dict[Any, Kernels]()
    for t in range(job.order.n_steps):
        if (kind := fused.kind(t)) not in of_kind:
            of_kind[kind] = count(lambda: fused.step(t))  # noqa: B023
    fed = [of_kind[fused.kind(t)] for t in range(job.order.n_steps)]
    return [prefix, *fed], prefix.total + sum(each.total for each in of_kind.values())


@dataclass(frozen=True)
class Prediction:
    """Of one batch by one runner on one GPU."""

    job: DecodeJob
    runner: PlannedRunner
    gpu: Gpu

    @cached_property
    def _counted(self) -> tuple[list[Kernels], int]:
        if self.runner == "fused":
            return kernels_of_kinds(self.job)
        found = kernels_of_steps(self.job)
        return found, sum(each.total for each in found) if self.runner == "graphs" else 0

    @property
    def kernels(self) -> int:
        """All that are started for a batch."""
        return sum(each.total for each in self._counted[0])

    @property
    def nodes(self) -> int:
        """Kernels that the graphs hold; 0 without graphs."""
        return self._counted[1]

    @property
    def graph_bytes(self) -> tuple[float, ...]:
        """Low, central and high memory of the graphs."""
        return tuple(self.nodes * each for each in OPERATORS["node"])

    @property
    def seconds(self) -> tuple[float, ...]:
        """Low, central and high; each at least the floor."""
        return tuple(self._seconds(i) for i in range(3))

    def _seconds(self, i: int) -> float:
        counted, total = self._counted[0], 0.0
        for forward, (_, seen, _), kernels in zip(self.job.forwards, self.job.calls, counted):
            at = {name: each[i] for name, each in (OWN if kernels.own else OPERATORS).items()}
            busy = self._products(forward, at) + self._attention(forward, seen, kernels, at)
            rest = kernels.total - kernels.attention - kernels.scans - sum(gemm.count for gemm in forward.gemms)
            together, waiting = self._together(forward, at)
            busy += at["small"] * max(0, rest) + at["scan"] * kernels.scans * self.job.sizes.backbone.vocabulary / 1024
            started = kernels.total + together
            total += max(busy + waiting + at["gap"] * started, at["launch"] * started * (self.runner == "eager"))
        if len(counted) > len(self.job.forwards):  # the last draw of the own kernels
            total += OWN["scan"][i] * self.job.sizes.backbone.vocabulary / 1024 + OWN["gap"][i] * counted[-1].total
        return total

    def _together(self, forward: Forward, at: dict[str, float]) -> tuple[int, float]:
        """Collectives among the devices that share the model, and their seconds: two sums of the states in each layer;
        the embeddings and the logits of either head, gathered; the codes, from the first one."""
        job, n = self.job, self.job.devices
        if n == 1:
            return 0, 0.0
        states = forward.gemms[0].rows * job.sizes.dim
        logits = [gemm.rows * job.sizes.backbone.vocabulary for gemm in forward.gemms if gemm.linear.name == "head"]
        moved = [2 * states] * (2 * job.layers) + [states, *logits, 0]  # a sum is moved twice; codes are few
        pace = self.gpu.link * at["link_bandwidth"] / (job.dtype.itemsize * (n - 1) / n)
        return len(moved), sum(max(at["collective"], elements / pace) for elements in moved)

    def _products(self, forward: Forward, at: dict[str, float]) -> float:
        """Seconds of the matrix products, each at the slower of memory and arithmetic."""
        bandwidth, rate = self.gpu.bandwidth * at["product_bandwidth"], self.gpu.flops * at["product_rate"]
        size = self.job.dtype.itemsize
        return sum(
            gemm.count * max(at["product"], gemm.linear.parameters * size / bandwidth, gemm.flops / gemm.count / rate)
            for gemm in forward.gemms
        )

    def _attention(self, forward: Forward, seen: int, kernels: Kernels, at: dict[str, float]) -> float:
        """Seconds of attention. A mask takes the form that walks all keys in order, 64 at a time."""
        layers = self.job.layers
        flops = (forward.flops - sum(gemm.flops for gemm in forward.gemms)) / layers
        bandwidth, rate = self.gpu.bandwidth * at["attention_bandwidth"], self.gpu.flops * at["attention_rate"]
        one = max(at["attention"], forward.cache_bytes / layers / bandwidth, flops / rate)
        walk = max(one, 2 * at["small"] + at["tile"] * seen / 64)
        return (kernels.attention - kernels.masked) * one + kernels.masked * walk


def prediction(job: DecodeJob, runner: PlannedRunner, gpu: Gpu) -> dict[str, Any] | None:
    """What `flashar plan --decode` adds to a plan; None = its loop is not counted. ValueError as `kernels_of_kinds`."""
    if job.order.name not in ("raster", "diagonal"):
        return None
    if job.devices > 1 and runner == "fused":
        raise ValueError("--runner fused does not know --tensor-parallel. Choose --runner graphs or eager.")
    made = Prediction(job, runner, gpu)
    counts = {"kernels": made.kernels, "graph_nodes": made.nodes, "graph_bytes": made.graph_bytes}
    return {"runner": runner, **counts, "predicted_s": made.seconds}
