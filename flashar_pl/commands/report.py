"""`flashar report`: raster, FlashAR and training-free decoding side by side, in numbers and pictures.

Shapes: n samples, H x W grid.
"""

from __future__ import annotations

import operator
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.plot import require_pyplot
from flashar_pl.console import Missed, progress_bar, table, versions
from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import DeviceOptions, ModelOptions, SamplingSettings, check_least, parse_classes

if TYPE_CHECKING:
    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge
    from flashar_pl.models import GridModel

PICTURE_CFG, PICTURE_COLUMNS = 1.5, 8


@dataclass(frozen=True)
class ReportOptions:
    """Comparison"""

    raster: str
    """Checkpoint of the raster model."""
    flashar: str
    """Checkpoint of the FlashAR model that was post-trained from it."""
    data: str
    """Directory of class-conditional shards with their manifest.json; the test split is scored."""
    classifier: str
    """Directory of the classifier behind FID and accuracy (`flashar classifier` makes it)."""
    out: str
    """Directory to make; it must not exist."""
    scratch: str | None = None
    """Checkpoint of a FlashAR model trained from random weights with the same budget."""
    samples: int = 1000
    """Images sampled for FID and accuracy, for each row and seed."""
    seeds: str = "0"
    """Sample seeds, such as 0 or 0,1; FID and accuracy are means over them, with half their range."""
    timed_images: int = 30
    """Images decoded one by one for the time per image, after a warm-up."""
    threads: int = 1
    """CPU threads; models this small are fastest on one."""
    check: bool = False
    """Exit with 1 where a bound of the digits demo is missed."""

    def __post_init__(self) -> None:
        check_least(self, samples=2, timed_images=1, threads=1)


@dataclass
class Row:
    """One line of the table."""

    key: str
    name: str
    model: GridModel
    plan: str
    checkpoint: str
    results: dict[str, Any] = field(default_factory=dict)


def report(asked: ReportOptions) -> dict[str, Any]:
    """Compare raster, FlashAR and training-free decoding on held-out images, by samples and by time.

    Writes a new directory with report.md, report.json, samples.png (grids side by side, guidance 1.5) and gate.png
    (red where the horizontal head decides). The training-free row is the raster checkpoint decoded diagonally with an
    untrained branch at FlashAR's layer. FID and accuracy are measured without guidance. For the curves of training runs
    see `flashar plot`, for models of photographs `flashar evaluate`.

    Example:
        flashar report --raster runs/demo/raster/checkpoints/last.ckpt --data data/digits --out runs/demo/report
            --flashar runs/demo/flashar/checkpoints/last.ckpt --classifier runs/demo/classifier
    """
    import torch

    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge, mean_gate
    from flashar_pl.metrics.classifier import ClassifierFeatures
    from flashar_pl.pictures import gate_picture, save_png

    target = require_new(asked.out, "report")
    require_pyplot()
    seeds = parse_classes(asked.seeds)
    torch.set_num_threads(asked.threads)
    manifest = Manifest.load(asked.data)
    judge = Judge.build(ClassifierFeatures.load(asked.classifier), manifest)
    rows = _rows(asked, manifest)
    measure(rows, manifest, judge, asked, seeds)
    bounds = check_bounds({row.key: row.results for row in rows})
    values = {
        "rows": {row.key: {"name": row.name, "checkpoint": row.checkpoint, **row.results} for row in rows},
        "bounds": bounds,
        "settings": {"samples": asked.samples, "seeds": seeds, "cfg_scale": 1.0, "picture_cfg_scale": PICTURE_CFG},
        "data": {"path": asked.data, "name": manifest.name, "fingerprint": manifest.fingerprint("test")},
        "threads": asked.threads,
        "versions": versions(),
    }
    with new_directory(target, "report") as folder:
        draw_samples(rows, manifest, judge, folder / "samples.png")
        gate = mean_gate(rows[1].model, manifest, "test")
        values["gate_map"] = gate.tolist()
        save_png(gate_picture(gate), folder / "gate.png")
        text = markdown(rows, values)
        write_text(folder / "report.md", text)
        write_json(folder / "report.json", values)
    print(text)
    print(f"wrote {target}/: report.md, report.json, samples.png, gate.png")
    missed = [bound["text"] for bound in bounds if not bound["met"]]
    if asked.check and missed:
        raise Missed(f"bounds missed: {'; '.join(missed)}. All numbers: {target}/report.json")
    return values


def _rows(asked: ReportOptions, manifest: Manifest) -> list[Row]:
    """The rows, each model checked against the data."""
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.commands.score import check_data
    from flashar_pl.models.flashar import FlashAR
    from flashar_pl.models.raster import RasterAR

    def row(key: str, name: str, checkpoint: str, branch_layer: int | None = None) -> Row:
        source = open_checkpoint(ModelOptions(checkpoint, branch_layer=branch_layer), DeviceOptions("cpu"))
        expected = RasterAR if key == "raster" else FlashAR
        if not isinstance(source.model, expected):
            kind = source.model.config()["kind"]
            raise ValueError(f"--{key} {source.path} is a {kind} model; expected {expected.__name__}.")
        check_data(source.model, manifest, source.grid, source.tokenizer)
        return Row(key, name, source.model, source.model.plan_name, source.path)

    rows = [row("raster", "raster", asked.raster), row("flashar", "FlashAR", asked.flashar)]
    branch = rows[1].model.config()["branch_layer"]
    rows.append(row("training_free", "training-free diagonal", asked.raster, branch))
    if asked.scratch is not None:
        rows.append(row("scratch", "FlashAR from scratch, same budget", asked.scratch))
    return rows


def measure(rows: list[Row], manifest: Manifest, judge: Judge, asked: ReportOptions, seeds: list[int]) -> None:
    """Fill in every row's results."""
    import torch

    from flashar_pl.checkpoints.opening import count_parameters
    from flashar_pl.commands.score import held_out, image_nll, summary
    from flashar_pl.evaluate.quality import sample_quality, time_per_image

    grid = manifest.grid
    with progress_bar(len(rows) * asked.samples * len(seeds), "samples") as advance:
        for row in rows:
            quality, left_out = sample_quality(row.model, row.plan, grid, judge, asked.samples, seeds, advance)
            batches = held_out(manifest, "test", 256, None, None, torch.device("cpu"))
            row.results = {
                "parameters": count_parameters(row.model),
                "steps": row.model.make_plan(row.plan, *grid).n_steps,
                **summary(image_nll(row.model, batches, row.plan), grid[0] * grid[1]),
                "fid": statistics.mean(quality["fid"]) if quality["fid"] else None,
                "accuracy": statistics.mean(quality["accuracy"]),
                "per_seed": quality,
                "left_out": left_out,
            }
    times = time_per_image([(row.model, row.plan) for row in rows], grid, asked.timed_images)
    for row, measured in zip(rows, times, strict=True):
        row.results["ms_per_image"] = measured
        row.results["speed_up"] = times[0]["median"] / measured["median"]


# --- bounds ---------------------------------------------------------------------------------------------------------


def check_bounds(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The digits demo's bounds: what was found, what is required, whether it is met."""
    raster, flashar, free = results["raster"], results["flashar"], results["training_free"]
    nll = "nll_nats_per_image"
    found = [
        ("raster NLL", raster[nll], "<", 76.0),
        ("raster accuracy", raster["accuracy"], ">=", 0.88),
        ("FlashAR NLL - raster NLL", flashar[nll] - raster[nll], "<", 4.0),
        ("accuracy lost to FlashAR", raster["accuracy"] - flashar["accuracy"], "<=", 0.06),
        ("decoding steps raster / FlashAR", raster["steps"] / flashar["steps"], ">=", 64 / 15),
        ("training-free NLL - raster NLL", free[nll] - raster[nll], ">=", 15.0),
        ("speed-up at batch 1", flashar["speed_up"], ">=", 1.5),
    ]
    if "scratch" in results:
        found.append(("from-scratch NLL - FlashAR NLL", results["scratch"][nll] - flashar[nll], ">=", 3.0))
    compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
    return [
        {
            "text": f"{name} = {value:.3g}, required {sign} {limit:.3g}",
            "value": value,
            "met": compare[sign](value, limit),
        }
        for name, value, sign, limit in found
    ]


# --- text -----------------------------------------------------------------------------------------------------------


def markdown(rows: list[Row], values: dict[str, Any]) -> str:
    """The table with its notes."""
    seeds, threads = values["settings"]["seeds"], values["threads"]
    head = ["", "decoding steps", "test NLL, nats/image", "FID", "class accuracy", "ms/image (batch 1)", "speed-up"]
    lines = []
    for row in rows:
        found, ms = row.results, row.results["ms_per_image"]
        lines.append([
            row.name, str(found["steps"]),
            f"{found['nll_nats_per_image']:.2f} ± {found['standard_error']:.2f}",
            _with_spread(found["per_seed"]["fid"], 1), _with_spread(found["per_seed"]["accuracy"], 3),
            f"{ms['median']:.1f} ({ms['lower_quartile']:.1f} to {ms['upper_quartile']:.1f})",
            f"{found['speed_up']:.2f}x",
        ])  # fmt: skip
    missing = [f"- No {name} of {row.name}: {why}" for row in rows for name, why in row.results["left_out"].items()]
    spread = "half the range over the sample seeds" if len(seeds) > 1 else "one sample seed, so without spread"
    notes = [
        f"- NLL: {rows[0].results['images']} test images, mean ± standard error, under each row's own factorisation.",
        f"- FID, accuracy: {values['settings']['samples']} samples per seed (seeds {', '.join(map(str, seeds))}), no "
        f"guidance, against all real images of {values['data']['name']}, on a small classifier's features; {spread}.",
        "  With so few images FID has a spread of 2 to 7 and a large bias: compare orders of magnitude only.",
        f"- Time: one image at a time, median (quartiles) after warm-up, CPU threads: {threads}. The claim is latency: "
        "fewer, wider steps decode one image sooner, while throughput at large batches gains far less on a CPU.",
        f"- Pictures: samples.png (guidance {PICTURE_CFG}), gate.png (horizontal head red, vertical blue).",
    ]
    notes += missing
    bounds = [f"- {'met' if bound['met'] else 'MISSED'}: {bound['text']}" for bound in values["bounds"]]
    title = "# Raster and diagonal decoding"
    return "\n".join([title, "", table(head, lines), "", *notes, "", "Bounds:", "", *bounds, ""])


def _with_spread(values: list[float], digits: int) -> str:
    if not values:
        return "none"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_samples(rows: list[Row], manifest: Manifest, judge: Judge, path: Path) -> None:
    """The rows' sample grids side by side, one line of images per class, equal seeds."""
    import torch

    from flashar_pl.backbones import ClassIds
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.samples import SampleSet, draw_codes
    from flashar_pl.pictures import tile

    classes = min(manifest.condition.num_classes or 1, 10)
    labels = torch.arange(classes).repeat_interleave(PICTURE_COLUMNS)
    settings = SamplingSettings(cfg_scale=PICTURE_CFG)
    pyplot = require_pyplot()
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.2 * len(rows), 6.2), squeeze=False, layout="constrained")
    for axis, row in zip(axes[0], rows, strict=True):
        samples = SampleSet(ClassIds(labels), manifest.grid, row.plan, settings, len(labels))
        codes = draw_codes(Engine(row.model), samples)
        sheet = tile(judge.tokenizer.decode(codes), PICTURE_COLUMNS)  # (3, h, w)
        axis.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(f"{row.name}\n{row.results['steps']} steps", fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
