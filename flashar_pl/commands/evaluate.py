"""`flashar evaluate`: FID, sFID, Inception Score, precision, recall and KID of a checkpoint's samples.

Shapes: n samples, h x w pixels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from flashar_pl.checkpoints.opening import check_plan, check_top_k
from flashar_pl.console import versions
from flashar_pl.decoding.build import EXACT
from flashar_pl.devices import find_device
from flashar_pl.evaluate.parts import RESULT, PartFolder
from flashar_pl.evaluate.processes import (
    Group,
    Progress,
    count_devices,
    device_of_rank,
    draw_on_devices,
    draw_parts,
    launched_group,
    work,
)
from flashar_pl.evaluate.reference import (
    Reference,
    load_reference_images,
    path_digest,
    tokenizer_identity,
)
from flashar_pl.evaluate.report import compute_metrics, draw_grid, write_codes, write_npz
from flashar_pl.evaluate.samples import (
    Bench,
    Job,
    absolute,
    class_count,
    image_size,
    load_bench,
    sample_labels,
)
from flashar_pl.options import Dtype, Plan, Runner, WeightFormat, Weights

Labels = Literal["balanced", "random"]


def evaluate(
    *,
    checkpoint: str,
    reference: str,
    features: str,
    out: str,
    num_samples: int = 50_000,
    labels: Labels = "balanced",
    metrics: str | list[str] | None = None,
    plan: Plan | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    resize: int | None = None,
    split: Literal["train", "validation", "test"] = "test",
    min_samples: int | None = None,
    save_npz: bool = False,
    weights: Weights = "auto",
    branch_layer: int | None = None,
    n_head: int | None = None,
    grid: str | None = None,
    tokenizer: str | None = None,
    cache: str | None = None,
    devices: int | None = None,
    device: str = "auto",
    dtype: Dtype = "fp32",
    runner: Runner = "auto",
    weight_format: WeightFormat = "auto",
) -> dict[str, Any] | None:
    """Draw samples of a class-conditional checkpoint and compare them with real images.

    Sample i has seed + i and its own class, in batches of one fixed shape: the number of devices changes nothing.
    A run that was stopped continues when the same command is given again. Runs on every visible GPU, on --devices
    processes, or under torchrun (several machines need a shared --out). Writes evaluation.json with every setting,
    hash and version, grid.png, codes.npy, and with --save-npz samples.npz for the ADM evaluator. Until it is finished,
    --out also holds the features, 20 KB for each sample with the Inception network. What the numbers mean, and how to
    get them wrong: docs/evaluation.md.

    Example:
        flashar evaluate --checkpoint c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --plan raster
          --cfg-scale 2.0 --labels random --reference VIRTUAL_imagenet256_labeled.npz
          --features weights-inception-2015-12-05-6726825d.pth --dtype bf16 --out eval/llamagen-b
        flashar evaluate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --reference data/digits --split test
          --features runs/demo/classifier --num-samples 1000 --out eval/digits

    Args:
        checkpoint: Lightning checkpoint, converted directory, or official .pt or .safetensors file.
        reference: the real images: an .npz with moments or images (ADM reference batches), a directory of images, or
            a directory of shards.
        features: what turns images into features: the file of Inception weights, or a classifier's directory.
        out: directory of the results; new, or one where the same evaluation was stopped.
        num_samples: images to draw.
        labels: balanced gives sample i the class i modulo the number of classes; random draws classes uniformly, as
            LlamaGen does.
        metrics: of fid, sfid, is, precision, recall, f1, kid, separated by commas. Default: all that features and
            reference allow.
        plan: decoding order: raster (H*W steps) or diagonal (H+W-1 steps). Default: the checkpoint's own.
        cfg_scale: classifier-free guidance s in u + s(c - u); 1 is off.
        cfg_interval: guide only steps with at most this number + 1 cells decoded before them. Default: every step.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 is off.
        top_p: keep the most likely codes up to this probability; 1 is off.
        seed: seed of the first sample; sample i uses seed + i.
        batch_size: samples decoded together on each device.
        resize: side of the measured images, bicubic without antialiasing. Default: 256 for images of 384 pixels,
            otherwise the size they have.
        split: which images of a reference that is shards.
        min_samples: fewest samples and reference images for FID and sFID. Default: more than they have features.
        save_npz: also write the samples as samples.npz.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        n_head: attention heads, for official files of unpublished sizes.
        grid: code grid HEIGHTxWIDTH, where the checkpoint does not say it (official files).
        tokenizer: what decodes the codes, where the checkpoint does not say it: vq16:FILE, vq8:FILE, ibq:FILE,
            pixels:LEVELS, or a JSON object.
        cache: directory for computed reference statistics. Default: references/ in the user's cache directory.
        devices: processes on this machine, one for each GPU. Default: every visible GPU.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations; softmax, sampling, tokenizer and features stay in float32 or wider.
        runner: eager, compiled, graphs or compiled-graphs; auto is graphs on a GPU, eager on a CPU.
        weight_format: plain, packed (laid out for a CPU's matrix products), int8 or fp8 (rounded; needs torchao);
            auto as in flashar generate.
    """
    options = Options(**locals())
    with launched_group() as group:
        if group.rank > 0:
            job, todo = group.receive()
            work(job, todo[group.rank :: group.ranks], device_of_rank(device, group.local_rank))
            group.wait()
            return None
        prepared: list[Run] = []

        def start() -> tuple[Job, list[int]]:
            prepared.append(prepare(options, group))
            return prepared[0].job, prepared[0].todo

        group.share(start)
        run = prepared[0]
        drawn = run.draw(group)
    result = run.finish(drawn)
    print("\n".join(f"{name:<10} {value:.6g}" for name, value in result["metrics"].items()))
    for name, reason in run.left_out.items():
        print(f"{name:<10} left out: {reason}")
    print(f"wrote {options.out}/{RESULT}")
    return result


@dataclass(frozen=True)
class Options:
    """The arguments of `evaluate`."""

    checkpoint: str
    reference: str
    features: str
    out: str
    num_samples: int
    labels: Labels
    metrics: str | list[str] | None
    plan: Plan | None
    cfg_scale: float
    cfg_interval: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int
    batch_size: int
    resize: int | None
    split: str
    min_samples: int | None
    save_npz: bool
    weights: Weights
    branch_layer: int | None
    n_head: int | None
    grid: str | None
    tokenizer: str | None
    cache: str | None
    devices: int | None
    device: str
    dtype: Dtype
    runner: Runner
    weight_format: WeightFormat

    def __post_init__(self) -> None:
        lowest = {"num_samples": 1, "batch_size": 1, "resize": 1, "min_samples": 2}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; expected {low} or more.")

    def metric_names(self) -> list[str] | None:
        """The metrics asked for; None = all that are possible."""
        given = self.metrics
        return [name.strip() for name in given.split(",")] if isinstance(given, str) else given

    def sampling(self) -> dict[str, Any]:
        """Settings of `SamplingSettings`."""
        from dataclasses import asdict

        from flashar_pl.sampling import SamplingSettings

        return asdict(
            SamplingSettings(self.cfg_scale, self.cfg_interval, self.temperature, self.top_k, self.top_p, greedy=False)
        )

    def for_report(self) -> dict[str, Any]:
        """What was asked for, without what cannot change a result."""
        from dataclasses import asdict

        return {k: v for k, v in asdict(self).items() if k not in ("out", "cache", "devices", "device")}


@dataclass
class Run:
    """An evaluation whose settings were found to be sound."""

    options: Options
    bench: Bench
    reference: Reference
    names: list[str]
    left_out: dict[str, str]
    job: Job
    identity: dict[str, Any]
    folder: PartFolder
    todo: list[int]
    processes: int
    """Processes on this machine; under torchrun 1."""
    num_classes: int

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.job.labels) // self.job.batch_size)

    def draw(self, group: Group) -> dict[str, Any]:
        """Draw what is missing, with the other processes; returns facts about this run."""
        progress = Progress(self.folder, self.batches, self.job.batch_size, len(self.job.labels))
        if group.ranks > 1:
            draw_parts(self.bench, self.job, self.todo[:: group.ranks], progress.update)
            group.wait()
        else:
            draw_on_devices(self.bench, self.job, self.todo, self.processes, self.options.device, progress)
        images, seconds = progress.close()
        return {
            "processes": group.ranks * self.processes,
            "device": str(find_device(self.options.device)),
            "runner": self.bench.engine.runner,
            "images_drawn": images,
            "images_kept_from_before": len(self.job.labels) - images,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 3) if images else None,
        }

    def finish(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Metrics, files and evaluation.json, from all parts; returns what that file holds."""
        missing = self.folder.missing(self.batches)
        if missing:
            raise ValueError(
                f"{len(missing)} of {self.batches} parts are not in {self.folder.parts}; on several machines --out "
                "must be a shared directory. Give the same command again to draw them."
            )
        print(f"computing {', '.join(self.names)}", file=sys.stderr)
        metrics = compute_metrics(self.folder, self.batches, self.names, self.bench, self.reference.statistics)
        codes = write_codes(self.folder, self.batches, self.bench.tokenizer.vocabulary)
        if self.options.save_npz:
            write_npz(self.folder, self.batches, len(self.job.labels), self.folder.path / "samples.npz")
        shown = draw_grid(self.bench, self.job, self.num_classes, self.folder.path / "grid.png")
        result = {
            "command": "evaluate",
            "metrics": metrics,
            "left_out": self.left_out,
            "samples": {**self.identity, "codes_sha256": codes, "grid_classes": shown},
            "reference": self.reference.facts,
            "settings": self.options.for_report(),
            "checkpoint": self.bench.source.facts(),
            "versions": versions(),
            "run": drawn,
        }
        self.folder.finish(result)
        return result


def prepare(options: Options, group: Group) -> Run:
    """Load everything and check every setting, before anything is drawn. Only the reference may take long."""
    import torch

    from flashar_pl.metrics.collector import choose_metrics

    sampling, names, folder = options.sampling(), options.metric_names(), PartFolder(options.out)
    folder.check()
    if group.ranks > 1 and options.devices is not None:
        raise ValueError("torchrun starts the processes here; leave out --devices.")
    processes = 1 if group.ranks > 1 else count_devices(options.devices, options.device)
    bench = _load(options, several=group.ranks > 1 or processes > 1)
    source = bench.source
    num_classes = class_count(source.model)
    check_top_k(source.model, options.top_k)
    plan = check_plan(source.model, options.plan, source.need_grid())
    side, size = image_size(bench, options.resize)
    reference = load_reference_images(
        options.reference, options.split, bench.extractor, tokenizer=options.tokenizer, cache=options.cache
    )
    if reference.side not in (None, size):
        raise ValueError(
            f"the samples are {size[0]} x {size[1]} pixels, the reference images {reference.side[0]} x "
            f"{reference.side[1]}; expected one size: --resize {reference.side[0]}, or another reference."
        )
    chosen, left_out = choose_metrics(
        names, bench.extractor, reference.statistics, options.num_samples, options.min_samples
    )
    job = Job(
        out=absolute(options.out),
        checkpoint=absolute(options.checkpoint),
        weights=options.weights,
        n_head=options.n_head,
        branch_layer=options.branch_layer,
        grid=source.need_grid(),
        tokenizer=source.need_tokenizer(),
        dtype=options.dtype,
        runner=options.runner,
        weight_format=options.weight_format,
        plan=plan,
        sampling=sampling,
        labels=sample_labels(options.labels, options.num_samples, num_classes, options.seed),
        batch_size=min(options.batch_size, options.num_samples),
        seed=options.seed,
        features=absolute(options.features),
        side=side,
        keep_images=options.save_npz,
        threads=torch.get_num_threads(),
    )
    identity = sample_identity(options, job, bench, size)
    folder.open(identity)
    todo = folder.missing(-(-options.num_samples // job.batch_size))
    return Run(options, bench, reference, chosen, left_out, job, identity, folder, todo, processes, num_classes)


def _load(options: Options, several: bool) -> Bench:
    """Model, tokenizer and features of the first process; several: others have devices of their own."""
    return load_bench(
        options.checkpoint,
        weights=options.weights,
        n_head=options.n_head,
        branch_layer=options.branch_layer,
        grid=options.grid,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        plan=options.plan,
        runner=options.runner,
        weight_format=options.weight_format,
        features=options.features,
        device=device_of_rank(options.device, 0) if several else options.device,
    )


def sample_identity(options: Options, job: Job, bench: Bench, size: tuple[int, int]) -> dict[str, Any]:
    """Everything the samples and their features depend on, with hashes in place of paths."""
    return {
        "checkpoint_sha256": path_digest(options.checkpoint),
        "weights": bench.source.kind,
        "branch_layer": options.branch_layer,
        "n_head": options.n_head,
        "grid": list(job.grid),
        "tokenizer": tokenizer_identity(bench.tokenizer.config()),
        "dtype": options.dtype,
        "weight_format": "plain" if options.weight_format in EXACT else options.weight_format,
        "plan": job.plan,
        **job.sampling,
        "number": options.num_samples,
        "labels": options.labels,
        "seed": options.seed,
        "batch_size": job.batch_size,
        "image_size": list(size),
        "resized": job.side is not None,
        "features": bench.extractor.fingerprint(),
        "save_npz": options.save_npz,
    }
