"""`flashar report`: raster, FlashAR and training-free decoding side by side, in numbers and pictures.

Shapes: n samples, H x W grid.
"""

from __future__ import annotations

import operator
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.plot import figure, require_pyplot
from flashar_pl.commands.score import caption_encoder, check_data, conditions_of, held_out, image_nll, summary
from flashar_pl.console import Missed, plus_minus, progress_bar, table, versions
from flashar_pl.files import new_directory, require_new, write_json, write_text
from flashar_pl.options import (
    AssetOptions,
    DeviceOptions,
    HubOptions,
    ModelOptions,
    SamplingSettings,
    check_least,
    parse_classes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.condition import Condition
    from flashar_pl.data.prompt_encoder import PromptEncoder
    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge
    from flashar_pl.models import GridModel

PICTURE_CFG, PICTURE_COLUMNS, PICTURE_LINES = 1.5, 10, 3
TOGETHER = 256
"""Test images of one forward."""
CLASSIFIER = "classifier"
"""Directory of the report with a metric network that was trained for it."""
DIAL, GROUPS, DIALLED = "dial.png", "groups_", ("raster", "lossless", "scratch")
"""Picture of the dial; begin of its rows' keys, and the rows beside them."""
BOUND = "digits"
"""Name of the data set that the bounds are about."""


@dataclass(frozen=True)
class ReportOptions(HubOptions):
    """Comparison"""

    raster: str
    """Checkpoint of the raster model."""
    flashar: str
    """Checkpoint of the FlashAR model that was post-trained from it."""
    data: str
    """Directory of shards with their manifest.json, of classes or captions; the test split is scored."""
    out: str
    """Directory to make; it must not exist."""
    classifier: str | None = None
    """Directory of the classifier behind FID and accuracy. Default: one is trained on the training split and kept in
    --out, as `flashar classifier` does."""
    scratch: str | None = None
    """Checkpoint of a FlashAR model trained from random weights with the same budget."""
    dial: str | None = None
    """Numbers of groups, such as 1,2,4,64, for a --flashar trained with model.flashar.intra: a row for each, a row for
    lossless decoding of --raster, and dial.png, which draws time against likelihood and samples."""
    samples: int = 1000
    """Images sampled for FID and accuracy, for each row and seed."""
    seeds: str = "0"
    """Sample seeds, such as 0 or 0,1; FID and accuracy are means over them, with half their range."""
    timed_images: int = 30
    """Images decoded one by one for the time per image, after a warm-up."""
    threads: int = 1
    """CPU threads; models this small are fastest on one."""
    check: bool = False
    """Exit with 1 where a bound of the digits demo is missed; of other data there are none."""

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


def report(asked: ReportOptions, text: AssetOptions = AssetOptions()) -> dict[str, Any]:
    """Compare raster, FlashAR and training-free decoding on held-out images, by samples and by time.

    Writes a new directory with report.md, report.json, samples.png (real images above samples of each row, guidance
    1.5) and gate.png (red where the horizontal head decides). The training-free rows are the raster checkpoint
    decoded diagonally with an untrained branch at FlashAR's layer: by the limited plan, the best there is, which the
    bounds are about, and as the average of both heads. FID and accuracy are measured without guidance.
    Samples have all classes in turn, with captions the first of the test split. For the curves of training runs see
    `flashar plot`, for models of photographs `flashar evaluate`.

    Example:
        flashar report --raster runs/demo/raster/checkpoints/last.ckpt --data data/digits --out runs/demo/report
            --flashar runs/demo/flashar/checkpoints/last.ckpt --classifier runs/demo/classifier
        flashar report --raster runs/own/raster/checkpoints/best.ckpt --data data/mine --out runs/own/report
            --flashar runs/own/flashar/checkpoints/best.ckpt
    """
    import torch

    from flashar_pl.commands.classifier import learn
    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import Judge, mean_gate
    from flashar_pl.metrics.classifier import ClassifierFeatures
    from flashar_pl.pictures import gate_picture, save_png

    target = require_new(asked.out, "report")
    seeds = parse_classes(asked.seeds, "seeds")
    if asked.dial is not None:
        require_pyplot()
    torch.set_num_threads(asked.threads)
    manifest = Manifest.load(asked.data)
    if asked.check and manifest.name != BOUND:
        raise ValueError(f"--check compares with bounds of {BOUND}, the data is {manifest.name!r}; leave it out.")
    network = None if asked.classifier is None else ClassifierFeatures.load(asked.classifier)
    rows, encoder = _rows(asked, manifest, text)
    network = network or learn(manifest)
    conditions, judge = conditions_of(manifest, encoder), Judge.build(network, manifest)
    measure(rows, manifest, encoder, conditions, judge, asked, seeds)
    values = describe(rows, manifest, asked, seeds)
    guidance = values["settings"]["picture_cfg_scale"]
    with new_directory(target, "report") as folder:
        if asked.classifier is None:
            network.save(folder / CLASSIFIER)
        draw_samples(rows, manifest, conditions, judge, guidance, folder / "samples.png")
        gate = mean_gate(rows[1].model, held_out(manifest, "test", TOGETHER, None, encoder, "cpu"), manifest.grid)
        values["gate_map"] = gate.tolist()
        save_png(gate_picture(gate), folder / "gate.png")
        page = markdown(rows, values)
        if asked.dial is not None:
            draw_dial(rows, folder / DIAL)
        write_text(folder / "report.md", page)
        write_json(folder / "report.json", values)
    print(page)
    print(f"wrote {target}/: {', '.join(sorted(path.name for path in target.iterdir()))}")
    missed = [bound["text"] for bound in values["bounds"] if not bound["met"]]
    if asked.check and missed:
        raise Missed(f"bounds missed: {'; '.join(missed)}. All numbers: {target}/report.json")
    return values


def describe(rows: list[Row], manifest: Manifest, asked: ReportOptions, seeds: list[int]) -> dict[str, Any]:
    """Everything measured, and what of, as plain values."""
    # captions have no guidance: not every model knows what leads away from one
    guidance = PICTURE_CFG if manifest.condition.num_classes is not None else 1.0
    settings = {"samples": asked.samples, "seeds": seeds, "cfg_scale": 1.0, "picture_cfg_scale": guidance,
                "metric_network": asked.classifier or CLASSIFIER}  # fmt: skip
    return {
        "rows": {row.key: {"name": row.name, "checkpoint": row.checkpoint, **row.results} for row in rows},
        "bounds": check_bounds({row.key: row.results for row in rows}) if manifest.name == BOUND else [],
        "settings": settings,
        "data": {"path": asked.data, "name": manifest.name, "fingerprint": manifest.fingerprint("test")},
        "threads": asked.threads,
        "versions": versions(),
    }


def _rows(asked: ReportOptions, manifest: Manifest, text: AssetOptions) -> tuple[list[Row], PromptEncoder | None]:
    """The rows, each model checked against the data, and what encodes its captions."""
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.models.flashar import FlashAR
    from flashar_pl.models.raster import RasterAR

    encoders: list[PromptEncoder | None] = []

    def row(key: str, name: str, checkpoint: str, plan: str | None = None, **given: Any) -> Row:
        source = open_checkpoint(ModelOptions(checkpoint, download=asked.download, **given), DeviceOptions("cpu"))
        expected, named = (RasterAR, "raster") if key in ("raster", "lossless") else (FlashAR, "FlashAR")
        if not isinstance(source.model, expected):
            kind = source.model.config()["kind"]
            raise ValueError(f"--{key} {source.path} is a {kind} model; expected a {named} model.")
        check_data(source.model, manifest, source.grid, source.tokenizer)
        if not encoders:
            encoders.append(caption_encoder(source, manifest, text.assets))
        return Row(key, name, source.model, plan or source.model.plan_name, source.path)

    rows = [row("raster", "raster", asked.raster), row("flashar", "FlashAR", asked.flashar)]
    if asked.dial is not None and rows[1].model.dual_head.intra is None:
        raise ValueError(
            f"--dial draws codes in groups, and {asked.flashar} has no head for it; expected a model that was trained "
            "with --model.flashar.intra.alone true (docs/results/beyond.md)."
        )
    branch = rows[1].model.config()["branch_layer"]
    rows.append(row("training_free", "training-free, limited", asked.raster, "limited", branch_layer=branch))
    rows.append(row("training_free_average", "training-free, average", asked.raster, branch_layer=branch))
    if asked.scratch is not None:
        rows.append(row("scratch", "FlashAR from scratch, same budget", asked.scratch))
    if asked.dial is not None:
        rows.append(row("lossless", "raster, lossless", asked.raster, "lossless"))
        for groups in dict.fromkeys(parse_classes(asked.dial, "dial")):
            rows.append(row(f"{GROUPS}{groups}", f"FlashAR, groups: {groups}", asked.flashar, groups=groups))
    return rows, encoders[0]


def measure(
    rows: list[Row], manifest: Manifest, encoder: PromptEncoder | None, conditions: Condition, judge: Judge,
    asked: ReportOptions, seeds: list[int],
) -> None:  # fmt: skip
    """Fill in every row's results."""
    from flashar_pl.checkpoints.opening import count_parameters
    from flashar_pl.evaluate.quality import sample_quality, time_per_image

    grid = manifest.grid
    with progress_bar(len(rows) * asked.samples * len(seeds), "samples") as advance:
        for row in rows:
            quality, left_out = sample_quality(
                row.model, row.plan, grid, judge, conditions, asked.samples, seeds, advance
            )
            nll = image_nll(row.model, held_out(manifest, "test", TOGETHER, None, encoder, "cpu"), row.plan)
            row.results = {
                "parameters": count_parameters(row.model),
                "steps": row.model.make_plan(row.plan, *grid).n_steps,
                **summary(nll, grid[0] * grid[1]),
                **{name: statistics.mean(values) if values else None for name, values in quality.items()},
                "per_seed": quality,
                "left_out": left_out,
            }
    times = time_per_image([(row.model, row.plan) for row in rows], grid, asked.timed_images, conditions)
    for row, measured in zip(rows, times, strict=True):
        row.results |= {"ms_per_image": measured, "speed_up": times[0]["median"] / measured["median"]}


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
    guidance = values["settings"]["picture_cfg_scale"]
    head = ["", "decoding steps", "test NLL, nats/image", "FID", "class accuracy", "ms/image (batch 1)", "speed-up"]
    lines = []
    for row in rows:
        found, ms = row.results, row.results["ms_per_image"]
        lines.append([
            row.name, f"{found['forwards']:.1f}" if "forwards" in found else str(found["steps"]),
            plus_minus(found["nll_nats_per_image"], found["standard_error"], ".2f"),
            _with_spread(found["per_seed"]["fid"], ".1f"), _with_spread(found["per_seed"]["accuracy"], ".3f"),
            f"{ms['median']:.1f} ({ms['lower_quartile']:.1f} to {ms['upper_quartile']:.1f})",
            f"{found['speed_up']:.2f}x",
        ])  # fmt: skip
    missing = [f"- No {name} of {row.name}: {why}" for row in rows for name, why in row.results["left_out"].items()]
    spread = "half the range over the sample seeds" if len(seeds) > 1 else "one sample seed, so without spread"
    notes = [
        f"- NLL: {rows[0].results['images']} test images, mean ± standard error, under each row's own factorisation.",
        f"- FID, accuracy: {values['settings']['samples']} samples per seed (seeds {', '.join(map(str, seeds))}), no "
        f"guidance, against all real images of {values['data']['name']}, on a small classifier's features; {spread}.",
        "  With so few images FID has a large bias and a spread that grows with it: compare orders of magnitude only.",
        f"- Time: one image at a time, median (quartiles) after warm-up, CPU threads: {threads}. The claim is latency: "
        "fewer, wider steps decode one image sooner, while throughput at large batches gains far less on a CPU.",
        f"- Pictures: samples.png (guidance {guidance}), gate.png (horizontal head red, vertical blue).",
    ]
    bounds = [f"- {'met' if bound['met'] else 'MISSED'}: {bound['text']}" for bound in values["bounds"]]
    tail = ["Bounds:", "", *bounds, ""] if bounds else []
    return "\n".join(["# Raster and diagonal decoding", "", table(head, lines), "", *notes, *missing, "", *tail])


def _with_spread(values: list[float], digits: str) -> str:
    half = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return plus_minus(statistics.mean(values), half, digits) if values else "none"


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_dial(rows: list[Row], path: Path) -> None:
    """Milliseconds of an image, with quartiles, against likelihood, FID and accuracy; the numbers of groups joined."""
    dial, others = [row for row in rows if row.key.startswith(GROUPS)], [row for row in rows if row.key in DIALLED]
    labels = {"nll_nats_per_image": "test NLL, nats/image", "fid": "FID", "accuracy": "class accuracy"}
    shown = [name for name in labels if all(row.results[name] is not None for row in dial + others)]
    with figure(path, 1, len(shown), (5 * len(shown), 4)) as axes:
        for axis, name in zip(axes, shown, strict=True):
            for points in (*([row] for row in others), dial):
                times, values = [row.results["ms_per_image"] for row in points], [row.results[name] for row in points]
                middle = [each["median"] for each in times]
                below = [each["median"] - each["lower_quartile"] for each in times]
                above = [each["upper_quartile"] - each["median"] for each in times]
                label = "FlashAR, groups of a diagonal" if points is dial else points[0].name
                axis.errorbar(middle, values, xerr=[below, above], fmt="o-", capsize=3, label=label)
            for row in dial:
                place = row.results["ms_per_image"]["median"], row.results[name]
                axis.annotate(row.key.removeprefix(GROUPS), place, xytext=(4, 5), textcoords="offset points")
            axis.set(xlabel="ms/image (batch 1)", ylabel=labels[name])
        axes[0].legend()


def draw_samples(
    rows: list[Row], manifest: Manifest, conditions: Condition, judge: Judge, guidance: float, path: Path
) -> None:
    """A column for each class or caption: a real test image, then `PICTURE_LINES` of each model, equal seeds."""
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.samples import SampleSet, decode_all, draw_codes
    from flashar_pl.pictures import save_png, sheet

    entries, heads, codes = real_images(manifest)
    shown, settings = conditions.rows(entries), SamplingSettings(cfg_scale=guidance)
    blocks, n = [("real", decode_all(judge.tokenizer, codes))], PICTURE_LINES * len(shown)
    for row in rows:
        samples = SampleSet(shown, manifest.grid, row.plan, settings, n, n=n)
        name = row.name.replace(", ", ",\n").replace(" ", "\n", 1)
        images = decode_all(judge.tokenizer, draw_codes(Engine(row.model), samples))
        blocks.append((f"{name}\n{row.results['steps']} steps", images))
    save_png(sheet(blocks, heads), path)


def real_images(manifest: Manifest) -> tuple[list[int], list[str], Tensor]:
    """A test image for each of the first classes that have one, or the first ones: what they are (class, or number of
    the image), what stands above them, and their codes (n, H, W)."""
    import numpy as np
    import torch

    from flashar_pl.data.shards import ShardReader

    reader = ShardReader(manifest, "test")
    samples = reader.read(np.arange(len(reader)))
    if samples.labels is None:
        entries = places = list(range(min(len(reader), PICTURE_COLUMNS)))
        heads = [str(place) if samples.texts is None else samples.texts[place] for place in places]
    else:
        found, first = np.unique(samples.labels, return_index=True)
        entries, places = found[:PICTURE_COLUMNS].tolist(), first[:PICTURE_COLUMNS].tolist()
        heads = [manifest.class_name(label) for label in entries]
    return entries, heads, torch.from_numpy(samples.codes[places])
