"""`flashar benchmark`: how fast decoding is, next to what the hardware allows and to raster decoding.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashar_pl.console import versions
from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import ComputeOptions, PresetOptions, SamplingSettings, WayOptions, as_settings

if TYPE_CHECKING:
    from flashar_pl.benchmarking.rows import Job


@dataclass(frozen=True)
class MeasureOptions:
    """Measurement"""

    plans: str = "raster,diagonal"
    """Decoding plans to measure, separated by commas."""
    batch_sizes: str = "1"
    """Images decoded together, separated by commas; auto is the largest that fits, up to 64 (CPU) or 1024 (GPU)."""
    repeats: int = 10
    """Measurements of each row; at most 3 where one takes more than 5 s, 1 above 20 s."""
    threads: int | None = None
    """CPU threads. Default: 1 or all cores, whichever runs one step faster."""
    skip_plain: bool = False
    """Leave out the plain raster decoder, the slowest row."""
    out: str | None = None
    """Directory to make for results.json and table.md."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"repeats is {self.repeats}, threads {self.threads}; expected 1 or more.")

    def plan_names(self) -> list[str]:
        """The plans. Raises ValueError for an unknown one."""
        from flashar_pl.grid import PLANS

        names = [name.strip() for name in self.plans.split(",")]
        if unknown := [name for name in names if name not in PLANS]:
            raise ValueError(f"plan is {unknown[0]!r}; expected one of {', '.join(PLANS)}, separated by commas.")
        return names


def benchmark(
    model: PresetOptions,
    measured: MeasureOptions = MeasureOptions(),
    sampling: SamplingSettings = SamplingSettings(),
    ways: WayOptions = WayOptions(),
    compute: ComputeOptions = ComputeOptions(),
) -> dict[str, Any]:
    """Measure decoding and compare it with the floor, with strong and with plain raster decoding.

    Needs no download: a preset has random weights, made on the device. For every plan and batch size: time per image
    and step, peak memory, the memory and arithmetic floors of exactly this job on this device (its own measured
    rates), and the time of the job's matrix products alone. Speed-ups are given against the raster plan of the same
    engine, against a plain raster decoder (guidance in two passes, a cache that grows by concatenation) and as the
    ratio of steps. Guidance (--cfg-scale above 1) doubles the rows. Prints a Markdown table.

    Example:
        flashar benchmark --preset llamagen-b --cfg-scale 2 --batch-sizes 1,8 --threads 1 --out benchmark/
    """
    from flashar_pl.benchmarking.measure import clock_name
    from flashar_pl.benchmarking.rows import Job, measure_all
    from flashar_pl.benchmarking.subjects import Subject, device_name
    from flashar_pl.benchmarking.table import speedups, table
    from flashar_pl.checkpoints.opening import check_plan
    from flashar_pl.devices import find_device
    from flashar_pl.numerics import dtype_from_name
    from flashar_pl.planner.room import Room

    if sampling.cfg_interval is not None:
        raise ValueError("floors and the plain decoder know no --cfg-interval; leave it out.")
    names, variants, repeats = measured.plan_names(), ways.each(), measured.repeats
    if measured.out is not None:
        require_new(measured.out, "benchmark")
    device, kind = find_device(compute.device), compute.dtype or "fp32"
    dtype, subject = dtype_from_name(kind), Subject.of(model, device, kind)
    if subject.loaded is not None:
        for name in names:
            check_plan(subject.loaded, name, subject.grid)
    alone = {"plain"} if device.type == "cpu" else {"plain", "auto"}  # see `choose_format`
    copies = (subject.loaded is None) + any(weights not in alone for _, weights in variants)
    room = Room(subject.sizes, tuple(names), subject.grid, device, dtype, sampling.guided, None, copies)
    batches = room.choose_all(measured.batch_sizes)
    job = Job(subject, subject.model(device, dtype), sampling, device, dtype, repeats)
    with thread_count(job, names[0], batches[0], measured.threads) as count:
        rows, failed = measure_all(job, variants, names, batches, measured.skip_plain)
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": as_settings(model, measured, sampling, ways, compute) | {"dtype": kind},
            "device": device_name(device),
            "threads": count if device.type == "cpu" else None,
            "clock": clock_name(device),
            "model": {"config": job.model.config(), "parameters": subject.sizes.parameters()},
            "grid": list(subject.grid),
            "speed": {plan: asdict(speed) | {"bandwidth": speed.bandwidth} for plan, speed in job.speeds.items()},
            "rows": rows,
            "failed": failed,
            "speedups": speedups(rows),
            "versions": versions(),
        }
    print(text := table(result))
    if measured.out is not None:
        with new_directory(measured.out, "benchmark") as folder:
            write_json(folder / "results.json", result)
            write_text(folder / "table.md", text)
        print(f"wrote {measured.out}")
    return result


@contextmanager
def thread_count(job: Job, plan: str, batch: int, threads: int | None) -> Iterator[int]:
    """Runs the block with the wanted number of CPU threads, or with that of 1 and all cores which is faster on the
    matrix products of one step; printed. On a GPU nothing changes."""
    import torch

    from flashar_pl.benchmarking.measure import GemmWalk, best

    before = torch.get_num_threads()
    try:
        if job.device.type == "cpu" and threads is None:
            planned = job.planned(plan, batch)
            walk, seconds = GemmWalk(job.model, planned).runner(planned.forwards[len(planned.forwards) // 2]), {}
            for count in sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1}):
                torch.set_num_threads(count)
                seconds[count] = best(walk, job.device, 5, "wall")
            threads = min(seconds, key=lambda count: seconds[count])
            tried = ", ".join(f"{count}: {1e3 * value:.1f} ms" for count, value in seconds.items())
            print(f"threads: {threads} (matrix products of one step with {tried})")
        if job.device.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
