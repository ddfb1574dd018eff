"""One row of `flashar benchmark`: a model, a plan and a batch size, measured.

Shapes: B images, H x W grid, P prefix, C text feature width.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.benchmarking.table import PLAIN
from flashar_pl.console import first_line, progress_bar
from flashar_pl.decoding.build import choose_format
from flashar_pl.options import EngineOptions, Runner, WeightFormat

if TYPE_CHECKING:
    import torch

    from flashar_pl.backbones.condition import Condition
    from flashar_pl.benchmarking.measure import Speed
    from flashar_pl.decoding import Engine
    from flashar_pl.models import GridModel
    from flashar_pl.planner.sizes import ModelSizes

GEMM_SAMPLES = 5
"""Measurements of the matrix products alone, spread between those of the whole job."""


def synthetic_model(sizes: ModelSizes, device: torch.device, dtype: torch.dtype) -> GridModel:
    """A model of these sizes with random weights, made on the device and in the dtype it is used in."""
    import torch

    from flashar_pl.backbones import build_backbone
    from flashar_pl.models import FlashAR, RasterAR

    with torch.device("meta"):
        backbone = build_backbone(json.loads(sizes.backbone))
        if sizes.flashar:
            fusion: Any = "gate" if sizes.gated else "average"
            model: GridModel = FlashAR(backbone, sizes.branch_layer, sizes.vertical_layers, fusion, sizes.corner)
        else:
            model = RasterAR(backbone)
    model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model.eval().requires_grad_(False)


def synthetic_condition(sizes: ModelSizes, batch: int, guided: bool) -> tuple[Condition, Condition | None]:
    """Conditions of `batch` images, and what guidance needs besides: class ids, random captions, or random prompts."""
    from flashar_pl.backbones import Prompts

    condition = sizes.conditioning.example(batch)
    if guided and isinstance(condition, Prompts):
        return condition, Prompts(row[:16] for row in condition)  # published empty prompts are this short
    return condition, None


@dataclass
class Job:
    """What the rows of one benchmark share."""

    model: GridModel
    sizes: ModelSizes
    grid: tuple[int, int]
    cfg_scale: float
    device: torch.device
    dtype: torch.dtype
    repeats: int
    speeds: dict[str, Speed] = field(default_factory=dict)
    """By plan: measured rates."""

    def row(self, plan: str, batch: int, engine: Engine | None = None, weight_format: str = "plain") -> dict[str, Any]:
        """Measure one row. engine: what decodes; None = the plain decoder of `flashar_pl.benchmarking.plain`."""
        from flashar_pl.benchmarking.measure import GemmWalk, Timing, clock, clock_name, repeats_for
        from flashar_pl.devices import peak_memory
        from flashar_pl.planner import decode_job

        planned = decode_job(self.sizes, plan, self.grid, batch, self.cfg_scale != 1, self.dtype)
        speed = self._speed(plan, planned)
        decode = self._decoder(plan, batch, engine)
        warm_up, timing, gemm = Timing(), Timing(), Timing()
        with peak_memory(self.device) as peak:
            clock(decode, self.device, warm_up)
        if engine is not None and engine.runner != "eager":
            clock(decode, self.device, warm_up)  # the first one compiled or recorded
        count = repeats_for(getattr(warm_up, clock_name(self.device))[-1], self.repeats)
        walk = None if engine is None else GemmWalk(engine.model, planned)
        for i in range(count):
            clock(decode, self.device, timing)
            if walk is not None and i < GEMM_SAMPLES:
                sample = walk.measure(samples=max(1, 3 // count))
                gemm.wall += sample.wall
                gemm.cpu += sample.cpu
        timed, name = timing.summary(), clock_name(self.device)
        seconds = timed[f"{name}_s"]
        products = gemm.summary() if walk is not None else None
        floor = planned.floor(speed.bandwidth, speed.matrix)
        return {
            "plan": PLAIN if engine is None else plan,
            "runner": "eager" if engine is None else engine.runner,
            "weight_format": weight_format,
            "batch": batch,
            "steps": planned.plan.n_steps,
            "warm_up_s": warm_up.wall[0],
            "time": timed,
            "seconds": seconds,
            "spread_s": timed[f"{name}_iqr_s"],
            "ms_per_image": 1e3 * seconds / batch,
            "images_per_s": batch / seconds,
            "ms_per_step": 1e3 * seconds / planned.plan.n_steps,
            "peak_bytes": peak.bytes,
            "bytes": planned.bytes,
            "flops": planned.flops,
            "bandwidth_floor_s": planned.bytes / speed.bandwidth,
            "flop_floor_s": planned.flops / speed.matrix,
            "floor_s": floor,
            "share_of_floor": floor / seconds,
            "gemm": products,
            "gemm_s": None if products is None else products[f"{name}_s"],
            "over_gemm": None if products is None else seconds / products[f"{name}_s"],
        }

    def _speed(self, plan: str, planned: Any) -> Speed:
        from flashar_pl.benchmarking.measure import device_speed

        if plan not in self.speeds:
            self.speeds[plan] = device_speed(self.sizes, planned, self.device, self.dtype)
        return self.speeds[plan]

    def _decoder(self, plan: str, batch: int, engine: Engine | None) -> Any:
        """A function that decodes `batch` images once."""
        import torch

        from flashar_pl.benchmarking.plain import generate_plain
        from flashar_pl.sampling import SamplingSettings

        torch.manual_seed(0)
        condition, unconditional = synthetic_condition(self.sizes, batch, self.cfg_scale != 1)
        if engine is None:
            settings = SamplingSettings(self.cfg_scale)
            return lambda: generate_plain(self.model, condition, self.grid, settings, 0, unconditional)
        return lambda: engine.generate(
            condition, self.grid, plan, cfg_scale=self.cfg_scale, seeds=0, unconditional=unconditional
        )


def measure_all(
    job: Job,
    variants: list[tuple[Runner, WeightFormat]],
    plans: list[str],
    batches: list[int],
    skip_plain: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every batch size, variant and plan, and of the plain decoder; and the rows that failed, with causes.

    Raises:
        ValueError: no row could be measured; the first cause.
    """
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    engines = _Engines(job.model)
    wanted = [
        (choose_format(job.model, EngineOptions(runner=runner, weight_format=w), plan), runner, plan)
        for runner, w in variants
        for plan in plans
    ]
    wanted = list(dict.fromkeys(wanted))
    with progress_bar(len(batches) * (len(wanted) + (not skip_plain)), "rows") as advance:
        for weights in dict.fromkeys(form for form, _, _ in wanted):
            for batch in batches:
                kinds: list[tuple[str, str]] = [(runner, plan) for form, runner, plan in wanted if form == weights]
                if not skip_plain and weights == wanted[0][0]:
                    kinds.append(("eager", PLAIN))
                for runner, plan in kinds:
                    try:
                        if plan == PLAIN:
                            rows.append(job.row("raster", batch))
                        else:
                            rows.append(job.row(plan, batch, engines.get(runner, weights), weights))
                    except (ValueError, RuntimeError) as error:  # also of kernels and of the allocator
                        cause = first_line(error)
                        failed.append({"plan": plan, "batch": batch, "runner": runner, "weight_format": weights,
                                       "cause": cause})  # fmt: skip
                    engines.clear()
                    advance(1)
    if failed and all(row["plan"] == PLAIN for row in rows):
        raise ValueError(failed[0]["cause"])
    return rows, failed


class _Engines:
    """A new engine for every row, so that none pays for the buffers of another; one copy of the weights at a time."""

    def __init__(self, model: GridModel) -> None:
        self._model = model
        self._prepared: tuple[WeightFormat, GridModel] = ("plain", model)

    def get(self, runner: str, weights: WeightFormat) -> Engine:
        from flashar_pl.decoding import Engine
        from flashar_pl.decoding.prepare import prepare

        if self._prepared[0] != weights:
            self._prepared = ("plain", self._model)  # the last copy makes room first
            self._prepared = (weights, prepare(self._model, weights))
        return Engine(self._prepared[1], runner)  # type: ignore[arg-type]

    def clear(self) -> None:
        """Give back what the last row held on a GPU."""
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()


def vq_rows(
    grid: tuple[int, int], batches: list[int], device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Time from codes to images of a VQ-16 with random weights, for every batch size, at most 8 images at once."""
    import torch

    from flashar_pl.benchmarking.measure import Timing, clock, clock_name, repeats_for
    from flashar_pl.tokenizers.vq16 import VQ16, VQ_PRESETS

    name = "float32" if dtype == torch.float32 else "bfloat16"
    decoder = VQ16(VQ_PRESETS["vq16"], decode_dtype=name).to(device).eval()
    found = []
    for batch in sorted({min(batch, 8) for batch in batches}):
        codes = torch.randint(0, decoder.vocabulary, (batch, *grid), device=device)
        warm_up, timing = Timing(), Timing()
        with torch.no_grad():
            clock(lambda codes=codes: decoder.decode(codes), device, warm_up)  # type: ignore[misc]
            for _ in range(repeats_for(getattr(warm_up, clock_name(device))[0], repeats)):
                clock(lambda codes=codes: decoder.decode(codes), device, timing)  # type: ignore[misc]
        timed = timing.summary()
        seconds = timed[f"{clock_name(device)}_s"]
        found.append({"batch": batch, "dtype": name, "time": timed, "ms_per_image": 1e3 * seconds / batch})
    return found


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
