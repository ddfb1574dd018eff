"""An evaluation: every rank draws its share of the batches, the first one measures what all have drawn.

Ranks meet before the first batch and after the last one; all else passes through the part files.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashar_pl.console import versions
from flashar_pl.decoding.build import EXACT
from flashar_pl.decoding.samples import draw
from flashar_pl.evaluate.identity import path_digest, tokenizer_identity
from flashar_pl.evaluate.options import Crop, Evaluation
from flashar_pl.evaluate.parts import PartFolder
from flashar_pl.evaluate.reference import Reference, load_reference_images
from flashar_pl.evaluate.results import draw_grid, write_codes, write_npz
from flashar_pl.evaluate.samples import Bench
from flashar_pl.metrics.extractor import device_of
from flashar_pl.metrics.table import choose_metrics, measure, standard_errors
from flashar_pl.options import as_settings
from flashar_pl.ranks import Rank

NO_MATTER = ("out", "run", "cache", "device")
"""Options that cannot change a result."""


@dataclass(frozen=True)
class Judge:
    """What the samples are compared with, and how."""

    reference: Reference
    names: list[str]
    """Metrics to compute."""
    left_out: dict[str, str]
    """Metrics that are not possible, and why."""


def evaluate_on_rank(asked: Evaluation, threads: int, rank: Rank) -> dict[str, Any] | None:
    """One rank's work; the first rank returns what evaluation.json holds. Wrong input: ValueError before any drawing.

    threads: of every rank on a CPU; the last bit of a sum depends on their number.
    """
    torch.set_num_threads(threads)
    assert asked.options.out is not None
    folder = PartFolder(asked.options.out)
    rank.first(folder.check)  # before anything is loaded
    bench = Bench.load(asked, rank.device)
    judge = find_judge(asked, bench) if rank.rank == 0 else None
    identity = sample_identity(asked, bench) if rank.rank == 0 else {}
    kept = rank.first(lambda: folder.open(identity, bench.samples.batches))
    began = time.monotonic()
    samples = bench.samples
    todo = [batch for batch in rank.share(samples.batches) if not folder.has(batch)]
    with rank.progress(len(todo) * samples.batch_size, "images") as advance:
        for drawn in draw(bench.engine, bench.tokenizer, samples, todo, bench.extractor, bench.resize):
            folder.write(drawn, asked.options.save_npz)
            advance(samples.batch_size)
    rank.barrier()
    if judge is None:
        return None
    made = samples.n - min(samples.n, kept * samples.batch_size)
    seconds = time.monotonic() - began
    run = {
        "processes": rank.world,
        "device": rank.device.type,
        "runner": bench.engine.runner,
        "images_drawn": made,
        "images_kept_from_before": samples.n - made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / seconds, 3) if made else None,
    }
    return finish(asked, bench, judge, folder, identity, run)


def find_judge(asked: Evaluation, bench: Bench) -> Judge:
    """The reference, whose features may take long, and the metrics that it allows."""
    options, size = asked.options, bench.size
    reference = load_reference_images(
        options.reference,
        options.split,
        bench.extractor,
        tokenizer=asked.model.tokenizer,
        cache=options.cache,
        crop=_reference_side(options.reference_crop, size),
    )
    if reference.side not in (None, size):
        raise ValueError(
            f"the samples are {size[0]} x {size[1]} pixels, the reference images {reference.side[0]} x "
            f"{reference.side[1]}; expected one size: --resize {reference.side[0]}, or another reference."
        )
    asked_for = None if options.metrics is None else [name.strip() for name in options.metrics.split(",")]
    names, left_out = choose_metrics(
        asked_for, bench.extractor, reference.statistics, options.num_samples, options.min_samples
    )
    return Judge(reference, names, left_out)


def _reference_side(crop: Crop, size: tuple[int, int]) -> int | None:
    """The side of the centre squares of reference images; None = they stay as they are."""
    if crop == "none":
        return None
    if size[0] != size[1]:
        raise ValueError(
            f"--reference-crop {crop} cuts squares, the samples are {size[0]} x {size[1]} pixels; leave it out, and "
            "give reference images of that size."
        )
    return size[0]


def sample_identity(asked: Evaluation, bench: Bench) -> dict[str, Any]:
    """Everything the samples and their features depend on, with hashes in place of paths."""
    options, model, engine = asked.options, asked.model, asked.engine
    return {
        "checkpoint_sha256": path_digest(model.checkpoint),
        "weights": bench.source.kind,
        "branch_layer": model.branch_layer,
        "n_head": model.n_head,
        "grid": list(bench.samples.grid),
        "tokenizer": tokenizer_identity(bench.tokenizer.config()),
        "dtype": bench.source.dtype,
        "weight_format": "plain" if engine.weight_format in EXACT else engine.weight_format,
        "plan": bench.samples.plan,
        **as_settings(bench.samples.sampling),
        "number": options.num_samples,
        "labels": options.labels,
        "seed": options.seed,
        "batch_size": bench.samples.batch_size,
        "image_size": list(bench.size),
        "resized": bench.resize is not None,
        "features": bench.extractor.fingerprint(),
        "save_npz": options.save_npz,
    }


def finish(
    asked: Evaluation, bench: Bench, judge: Judge, folder: PartFolder, identity: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Metrics, files and evaluation.json, from all parts; returns what that file holds."""
    batches, out = bench.samples.batches, folder.path
    absent = sum(not folder.has(batch) for batch in range(batches))
    if absent:
        raise ValueError(
            f"{absent} of {batches} parts are not in {folder.parts}; on several machines --out must be a shared "
            "directory. Give the same command again to draw them."
        )
    print(f"computing {', '.join(judge.names)}", file=sys.stderr)
    features = folder.features(batches, device_of(bench.extractor))
    metrics, missing = measure(judge.names, features, judge.reference.statistics)
    if not metrics:
        listed = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise ValueError(f"no metric has a value: {listed}. The samples are kept in {out}.")
    codes = write_codes(folder, batches, bench.tokenizer.vocabulary)
    if asked.options.save_npz:
        write_npz(folder, batches, bench.samples.n, out / "samples.npz")
    shown = draw_grid(bench, out / "grid.png")
    result = {
        "command": "evaluate",
        "metrics": metrics,
        "standard_errors": standard_errors(metrics, features, judge.reference.statistics),
        "left_out": judge.left_out | missing,
        "samples": {**identity, "codes_sha256": codes, "grid_classes": shown},
        "reference": judge.reference.facts,
        "settings": settings_of(replace(asked, sampling=bench.samples.sampling)),
        "checkpoint": bench.source.facts(),
        "versions": versions(),
        "run": run,
    }
    folder.finish(result)
    return result


def settings_of(asked: Evaluation) -> dict[str, Any]:
    """All options that a result may depend on, as plain values."""
    settings = as_settings(asked.options, asked.model, asked.sampling, asked.engine)
    return {name: value for name, value in settings.items() if name not in NO_MATTER}
