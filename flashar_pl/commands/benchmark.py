"""`flashar benchmark`: how fast decoding is, next to what the hardware allows and to raster decoding.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import (
    ComputeOptions,
    PixelOptions,
    PresetOptions,
    SamplingSettings,
    WayOptions,
    as_settings,
    check_least,
    split_names,
)

if TYPE_CHECKING:
    from flashar_pl.benchmarking.subjects import Subject


@dataclass(frozen=True)
class MeasureOptions(PixelOptions):
    """Measurement"""

    plans: str | None = None
    """Decoding plans to measure, separated by commas. Default: raster and diagonal, or what the model has."""
    batch_sizes: str = "1"
    """Images decoded together, separated by commas; auto is the largest that fits, up to 64 (CPU) or 1024 (GPU)."""
    repeats: int | None = None
    """Measurements of each row. Default: 10, or 3 where one takes more than 5 s, 1 above 20 s."""
    threads: int = 1
    """CPU threads."""
    skip_plain: bool = False
    """Leave out the plain raster decoder, the slowest row; models without a raster plan have none."""
    pixels: str | None = None
    """Measure the time to pixels, too, with an image tokenizer: vq16, vq8 or ibq, of published size with random
    weights; or vq16:FILE and so on, as --tokenizer elsewhere."""
    out: str | None = None
    """Directory to make for results.json and table.md."""

    def __post_init__(self) -> None:
        check_least(self, repeats=1, threads=1)
        if self.pixel_dtype is not None and self.pixels is None:
            raise ValueError("pixel_dtype is of the image tokenizer, and none is measured; add --pixels vq16.")


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
    ratio of steps. Guidance (--cfg-scale above 1) doubles the rows. Times are those of codes; with --pixels two
    columns have the pixels', and both together. Prints a Markdown table.

    Example:
        flashar benchmark --preset llamagen-b --cfg-scale 2 --batch-sizes 1,8 --threads 1 --out benchmark/
    """
    from flashar_pl.backbones import describe_backbone
    from flashar_pl.benchmarking.measure import circumstances, cpu_threads
    from flashar_pl.benchmarking.pixels import add_pixels, pixel_tokenizer
    from flashar_pl.benchmarking.rows import Job, measure_all
    from flashar_pl.benchmarking.subjects import Subject
    from flashar_pl.benchmarking.table import speedups, table
    from flashar_pl.devices import find_device
    from flashar_pl.numerics import dtype_from_name
    from flashar_pl.planner.decode import DecodeJob
    from flashar_pl.planner.room import Room

    if sampling.cfg_interval is not None:
        raise ValueError("floors and the plain decoder know no --cfg-interval; leave it out.")
    variants, repeats = ways.each(), measured.repeats
    if measured.out is not None:
        require_new(measured.out, "benchmark")
    device, kind = find_device(compute.device), compute.dtype or "fp32"
    dtype, subject = dtype_from_name(kind), Subject.of(model, device, kind)
    described, names = describe_backbone(subject.sizes.config["backbone"]), plans_of(subject, measured.plans)
    sampling = sampling.of(described.published_cfg_scale)
    skip_plain = measured.skip_plain or "raster" not in subject.sizes.model.plans
    alone = {"plain"} if device.type == "cpu" else {"plain", "auto"}  # see `choose_format`
    copies = (subject.loaded is None) + any(weights not in alone for _, weights in variants)
    sizes, grid = subject.sizes, subject.grid
    jobs = tuple(DecodeJob(sizes, name, grid, guided=described.guided(sampling), dtype=dtype) for name in names)
    batches = Room(jobs, device, copies).choose_all(measured.batch_sizes)
    job = Job(subject, subject.model(device, dtype), sampling, device, dtype, repeats)
    decoder, pixels = None, None
    if measured.pixels is not None:
        decoder = pixel_tokenizer(measured.pixels, job.model, device, measured.pixel_dtype)
    with cpu_threads(device, measured.threads):
        rows, failed = measure_all(job, variants, names, batches, skip_plain)
        if decoder is not None:
            pixels = add_pixels(rows, decoder, grid, device, repeats)
        result: dict[str, Any] = {
            **circumstances(device, measured.threads),
            "command": as_settings(model, measured, sampling, ways, compute) | {"dtype": kind},
            "model": {"config": job.model.config(), "parameters": sizes.parameters},
            "grid": list(grid),
            "speed": {plan: asdict(speed) | {"bandwidth": speed.bandwidth} for plan, speed in job.speeds.items()},
            "pixels": pixels,
            "rows": rows,
            "failed": failed,
            "speedups": speedups(rows),
        }
    print(text := table(result))
    if measured.out is not None:
        with new_directory(measured.out, "benchmark") as folder:
            write_json(folder / "results.json", result)
            write_text(folder / "table.md", text)
        print(f"wrote {measured.out}")
    return result


def plans_of(subject: Subject, given: str | None) -> list[str]:
    """The plans to measure; None = the model's own. ValueError for one that it cannot run."""
    from flashar_pl.checkpoints.opening import check_plan
    from flashar_pl.grid import PLANS

    own = subject.sizes.model.plans
    names = split_names("plans", given or ",".join(own), PLANS if "raster" in own else own)
    if subject.loaded is not None:
        for name in names:
            check_plan(subject.loaded, name, subject.grid)
    return names
