"""`flashar benchmark`: how fast decoding is, next to what the hardware allows and to raster decoding.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flashar_pl.benchmarking.table import plot, print_table, speedups, table
from flashar_pl.checkpoints.opening import check_plan, open_checkpoint
from flashar_pl.console import versions
from flashar_pl.decoding.build import parse_variants
from flashar_pl.devices import find_device
from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import DeviceOptions, Dtype, ModelOptions, parse_grid
from flashar_pl.planner.room import Room

if TYPE_CHECKING:
    import torch

    from flashar_pl.models import GridModel
    from flashar_pl.planner.sizes import ModelSizes


def benchmark(
    *,
    preset: str | None = None,
    checkpoint: str | None = None,
    plans: str = "raster,diagonal",
    batch_sizes: str = "1",
    cfg_scale: float = 2.0,
    grid: str | None = None,
    branch_layer: int | None = None,
    device: str = "auto",
    dtype: Dtype = "fp32",
    runner: str = "auto",
    weight_format: str = "auto",
    repeats: int = 10,
    threads: int | None = None,
    skip_plain: bool = False,
    vq: bool = False,
    png: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Measure decoding and compare it with the floor, with strong and with plain raster decoding.

    Needs no download: a preset has random weights, made on the device. For every plan and batch size: time per image
    and step, peak memory, the memory and arithmetic floors of exactly this job on this device (its own measured
    rates), and the time of the job's matrix products alone. Speed-ups are given against the raster plan of the same
    engine, against a plain raster decoder (guidance in two passes, a cache that grows by concatenation) and as the
    ratio of steps. Prints a Markdown table.

    Example:
        flashar benchmark --preset llamagen-b --batch-sizes 1,8 --threads 1 --out benchmark/

    Args:
        preset: published size with random weights: llamagen-b, -l, -xl, -xxl, -3b, -xl-t2i, or emu35-34b.
        checkpoint: a checkpoint of any kind instead of a preset.
        plans: decoding plans to measure, separated by commas.
        batch_sizes: images decoded together, separated by commas; auto is the largest that fits, up to 64 (CPU) or
            1024 (GPU).
        cfg_scale: classifier-free guidance, which doubles the rows; 1 is off.
        grid: code grid HEIGHTxWIDTH. Default: the checkpoint's own; of a preset 16x16, of emu35 32x32.
        branch_layer: layer where the vertical branch forks off. Default: L - 1, of emu35 L - 4; a FlashAR
            checkpoint's own.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations.
        runner: what drives decoding, one or several separated by commas: eager, compiled, graphs, compiled-graphs;
            auto is graphs on a GPU, eager on a CPU. The strong raster row uses the same as the diagonal one.
        weight_format: plain, packed, int8 or fp8, one or several separated by commas; auto is what
            flashar generate takes for the plan.
        repeats: measurements of each row; at most 3 where one takes more than 5 s, 1 above 20 s.
        threads: CPU threads. Default: 1 or all cores, whichever runs one step faster.
        skip_plain: leave out the plain raster decoder, the slowest row.
        vq: also measure decoding codes to images (a VQ-16 with random weights).
        png: also draw latency and share of the floor against the batch size; needs --out and matplotlib.
        out: directory to make for results.json, table.md and the PNG.
    """
    command = dict(locals())
    from flashar_pl.benchmarking import rows
    from flashar_pl.benchmarking.measure import clock_name
    from flashar_pl.numerics import dtype_from_name
    from flashar_pl.planner import model_sizes

    names = _check(preset, checkpoint, plans, repeats, threads, png, out)
    variants = parse_variants(runner, weight_format)
    place, kind = find_device(device), dtype_from_name(dtype)
    source = None
    if checkpoint is not None:
        source = open_checkpoint(
            ModelOptions(checkpoint, grid=grid, branch_layer=branch_layer), DeviceOptions(device, dtype)
        )
        config, shape = source.model.config(), source.need_grid()
        for name in names:
            check_plan(source.model, name, shape)
    else:
        config = {"kind": "flashar", "backbone": {"preset": preset}, "branch_layer": branch_layer}
        shape = parse_grid(grid) or model_sizes(config).usual_grid
    sizes, guided = model_sizes(config), cfg_scale != 1
    alone = {"plain"} if place.type == "cpu" else {"plain", "auto"}  # see `choose_format`
    copies = (source is None) + any(weights not in alone for _, weights in variants)
    batches = Room(sizes, tuple(names), shape, place, kind, guided, None, copies).choose_all(batch_sizes)
    model = source.model if source is not None else rows.synthetic_model(sizes, place, kind)
    with thread_count(model, sizes, names[0], shape, batches[0], guided, kind, threads) as count:
        job = rows.Job(model, sizes, shape, cfg_scale, place, kind, repeats)
        measured, failed = rows.measure_all(job, variants, names, batches, skip_plain)
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "device": rows.device_name(place),
            "threads": count if place.type == "cpu" else None,
            "clock": clock_name(place),
            "model": {"config": model.config(), "parameters": sizes.parameters()},
            "grid": list(shape),
            "speed": {plan: speed.facts() for plan, speed in job.speeds.items()},
            "rows": measured,
            "failed": failed,
            "speedups": speedups(measured),
            "vq": rows.vq_rows(shape, batches, place, kind, repeats) if vq else [],
            "versions": versions(),
        }
    _report(result, out, png)
    return result


def _report(result: dict[str, Any], out: str | None, png: bool) -> None:
    """Show the table; write it, the JSON and the drawing if a directory was given."""
    print_table(result)
    if out is None:
        return
    with new_directory(out, "benchmark") as folder:
        write_json(folder / "results.json", result)
        write_text(folder / "table.md", table(result))
        if png:
            plot(result, folder / "benchmark.png")
    print(f"wrote {out}")


def _check(
    preset: str | None,
    checkpoint: str | None,
    plans: str,
    repeats: int,
    threads: int | None,
    png: bool,
    out: str | None,
) -> list[str]:
    """Names of the plans, if the options fit together. ValueError otherwise."""
    from flashar_pl.grid import PLANS

    if (preset is None) == (checkpoint is None):
        raise ValueError("give either --preset NAME (random weights) or --checkpoint PATH.")
    if repeats < 1 or (threads is not None and threads < 1):
        raise ValueError(f"repeats is {repeats}, threads {threads}; expected 1 or more.")
    if png and out is None:
        raise ValueError("--png needs --out DIR.")
    if png:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ValueError("--png needs matplotlib: pip install 'flashar-pl[demo]'.") from error
    if out is not None:
        require_new(out, "benchmark")
    names = [name.strip() for name in plans.split(",") if name.strip()]
    for name in names:
        if name not in PLANS:
            raise ValueError(f"plan is {name!r}; expected one of {', '.join(PLANS)}, separated by commas.")
    if not names:
        raise ValueError("plans is empty; expected for example raster,diagonal.")
    return names


@contextmanager
def thread_count(
    model: GridModel,
    sizes: ModelSizes,
    plan: str,
    grid: tuple[int, int],
    batch: int,
    guided: bool,
    dtype: torch.dtype,
    threads: int | None,
) -> Iterator[int]:
    """Runs the block with the wanted number of CPU threads, or with that of 1 and all cores which is faster on the
    matrix products of one step; printed. On a GPU nothing changes."""
    import torch

    from flashar_pl.benchmarking.measure import GemmWalk, Timing, clock
    from flashar_pl.planner import decode_job

    device, before = next(model.parameters()).device, torch.get_num_threads()
    try:
        if device.type == "cpu" and threads is None:
            job = decode_job(sizes, plan, grid, batch, guided, dtype)
            walk = GemmWalk(model, job).runner(job.forwards[len(job.forwards) // 2])
            seconds = {}
            for count in sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1}):
                torch.set_num_threads(count)
                walk()
                timing = Timing()
                for _ in range(5):
                    clock(walk, device, timing)
                seconds[count] = min(timing.wall)
            threads = min(seconds, key=lambda count: seconds[count])
            tried = ", ".join(f"{count}: {1e3 * value:.1f} ms" for count, value in seconds.items())
            print(f"threads: {threads} (matrix products of one step with {tried})")
        if device.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
