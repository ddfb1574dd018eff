"""Rows of `flashar benchmark`: a plan, a batch size and a way of decoding, measured.

Shapes: B images, H x W grid.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from flashar_pl.benchmarking.measure import GemmWalk, Speed, Timing, clock, clock_name, device_speed, repeats_for
from flashar_pl.benchmarking.plain import generate_plain
from flashar_pl.benchmarking.subjects import Subject
from flashar_pl.benchmarking.table import PLAIN
from flashar_pl.console import first_line, progress_bar
from flashar_pl.decoding import Engine
from flashar_pl.decoding.build import choose_format
from flashar_pl.decoding.prepare import prepare
from flashar_pl.devices import peak_memory
from flashar_pl.layers.rounded import rounding_of
from flashar_pl.models import GridModel
from flashar_pl.options import EngineOptions, Runner, SamplingSettings, WeightFormat
from flashar_pl.planner.decode import DecodeJob

GEMM_SAMPLES = 5
"""Measurements of the matrix products alone, spread between those of the whole job."""


@dataclass
class Job:
    """What the rows of one benchmark share."""

    subject: Subject
    model: GridModel
    sampling: SamplingSettings
    device: torch.device
    dtype: torch.dtype
    repeats: int | None
    speeds: dict[str, Speed] = field(default_factory=dict)
    """By plan, or "plan, int8" of rounded weights: measured rates."""

    def row(self, plan: str, batch: int, engine: Engine | None = None, weight_format: str = "plain") -> dict[str, Any]:
        """Measure one row. engine: what decodes; None = the plain decoder of `flashar_pl.benchmarking.plain`."""
        sizes, grid = self.subject.sizes, self.subject.grid
        guided, rounding = self.model.backbone.guided(self.sampling), rounding_of(weight_format)
        planned = DecodeJob(sizes, plan, grid, batch, guided, self.dtype, rounded=rounding is not None)
        key = ", ".join(filter(None, (plan, rounding)))
        if key not in self.speeds:
            self.speeds[key] = device_speed(planned, self.device, rounding)
        speed, decode, name = self.speeds[key], self._decoder(plan, batch, engine), clock_name(self.device)
        warm_up, timing, gemm = Timing(), Timing(), Timing()
        with peak_memory(self.device) as peak:
            clock(decode, self.device, warm_up)
        if engine is not None and engine.runner != "eager":
            clock(decode, self.device, warm_up)  # the first one compiled or recorded
        if plan == "lossless" and engine is not None:  # whose forwards are known now, and are the same every time
            slots = min(2 * (grid[1] + sizes.backbone.row_ends), planned.order.n_slots)
            planned = replace(planned, window=(slots, max(engine.forwards) - 1))
        count = repeats_for(getattr(warm_up, name)[-1], self.repeats)
        walk = None if engine is None else GemmWalk(engine.model, planned)
        for i in range(count):
            clock(decode, self.device, timing)
            if walk is not None and i < GEMM_SAMPLES:
                sample = walk.measure(samples=max(1, 3 // count))
                gemm.wall += sample.wall
                gemm.cpu += sample.cpu
        timed, products = timing.summary(), None if walk is None else gemm.summary()
        seconds, gemm_s = timed[f"{name}_s"], None if products is None else products[f"{name}_s"]
        floor, steps = planned.floor(speed.bandwidth, speed.matrix), len(planned.forwards)
        return {
            "plan": PLAIN if engine is None else plan,
            "runner": "eager" if engine is None else engine.runner,
            "weight_format": weight_format,
            "batch": batch,
            "steps": steps,
            "codes_per_forward": grid[0] * grid[1] / steps,
            "warm_up_s": warm_up.wall[0],
            "time": timed,
            "seconds": seconds,
            "spread_s": timed[f"{name}_iqr_s"],
            "ms_per_image": 1e3 * seconds / batch,
            "images_per_s": batch / seconds,
            "ms_per_step": 1e3 * seconds / steps,
            "peak_bytes": peak.bytes,
            "bytes": planned.bytes,
            "flops": planned.flops,
            "bandwidth_floor_s": planned.bytes / speed.bandwidth,
            "flop_floor_s": planned.flops / speed.matrix,
            "floor_s": floor,
            "share_of_floor": floor / seconds,
            "gemm": products,
            "gemm_s": gemm_s,
            "over_gemm": None if gemm_s is None else seconds / gemm_s,
        }

    def _decoder(self, plan: str, batch: int, engine: Engine | None) -> Callable[[], Any]:
        """A function that decodes `batch` images once."""
        torch.manual_seed(0)
        grid, settings = self.subject.grid, self.sampling
        condition, nulls = self.subject.condition(batch, settings.guided)
        if engine is None:
            return lambda: generate_plain(self.model, condition, grid, settings, 0, nulls)
        return lambda: engine.generate(condition, grid, plan, seeds=0, unconditional=nulls, **asdict(settings))


def measure_all(
    job: Job, ways: list[tuple[Runner, WeightFormat]], plans: list[str], batches: list[int], skip_plain: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every format of weights, batch size, runner and plan, and of the plain decoder; and those that
    failed, with causes. Every row has an engine of its own, so that none pays for the buffers of another.

    Raises:
        ValueError: no row could be measured; the first cause.
    """
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    asked = [(EngineOptions(runner=runner, weight_format=weights), plan) for runner, weights in ways for plan in plans]
    wanted = list(dict.fromkeys((choose_format(job.model, o, plan), o.runner, plan) for o, plan in asked))
    with progress_bar(len(batches) * (len(wanted) + (not skip_plain)), "rows") as advance:
        for form in dict.fromkeys(form for form, _, _ in wanted):
            prepared = None  # the last copy makes room first
            kinds: list[tuple[str, str]] = [(runner, plan) for each, runner, plan in wanted if each == form]
            if not skip_plain and form == wanted[0][0]:
                kinds.append(("eager", PLAIN))
            for batch, (runner, plan) in ((batch, kind) for batch in batches for kind in kinds):
                try:
                    if plan == PLAIN:
                        rows.append(job.row("raster", batch))
                    else:
                        prepared = prepare(job.model, form) if prepared is None else prepared
                        rows.append(job.row(plan, batch, Engine(prepared, runner), form))  # type: ignore[arg-type]
                except (ValueError, RuntimeError) as error:  # also of kernels and of the allocator
                    cause = first_line(error)
                    failed.append(
                        {"plan": plan, "batch": batch, "runner": runner, "weight_format": form, "cause": cause}
                    )
                gc.collect()
                torch.cuda.empty_cache()
                advance(1)
    if failed and all(row["plan"] == PLAIN for row in rows):
        raise ValueError(failed[0]["cause"])
    return rows, failed
