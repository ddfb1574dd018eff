"""Measurements behind the report: quality of samples, time per image, mean gate.

Shapes: n samples, N images of a split, H x W grid, D features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.backbones.condition import Batch, Condition
from flashar_pl.data.encode import decoder_of
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.decoding import Engine
from flashar_pl.decoding.samples import SampleSet, decode_all, draw_codes
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.extractor import extract_features
from flashar_pl.metrics.reference import ReferenceStatistics, reference_from_batches
from flashar_pl.metrics.table import measure
from flashar_pl.models import GridModel
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import Tokenizer

SEED_STRIDE = 1_000_000
"""Sample i of sample seed s is drawn from s * SEED_STRIDE + i, so that seeds share no sample."""
TOGETHER = 100
"""Samples decoded together."""
WARM_UP = 3
"""Images decoded before the clock counts."""


@dataclass
class Judge:
    """What samples are judged by: a classifier and real images."""

    classifier: ClassifierFeatures
    tokenizer: Tokenizer
    real: ReferenceStatistics
    """Features of real images."""

    @classmethod
    def build(cls, classifier: ClassifierFeatures, manifest: Manifest) -> Judge:
        """With all images of every split as the real side."""
        splits = [split for split in manifest.splits if manifest.samples(split)]
        images = (split_images(manifest, split)[0] for split in splits)
        return cls(classifier, decoder_of(manifest), reference_from_batches(classifier, images))


def split_images(manifest: Manifest, split: str) -> tuple[Tensor, Tensor | None]:
    """Images (n, 3, h, w) uint8 and labels (n,) int64, None = it has no classes, of a split, evaluation crops."""
    reader = ShardReader(manifest, split)
    samples = reader.read(np.arange(len(reader)))
    images = decode_all(decoder_of(manifest), torch.from_numpy(samples.codes))
    return images, None if samples.labels is None else torch.from_numpy(samples.labels)


def sample_quality(
    model: GridModel,
    plan: str,
    grid: tuple[int, int],
    judge: Judge,
    condition: Condition,
    samples: int,
    seeds: list[int],
    advance: Callable[[int], Any] = lambda n: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """ "fid" and "accuracy" of n samples for each sample seed, and why a seed has none (the last one's reason); where
    the plan has no fixed number of forwards, their mean "forwards".

    condition: of m entries; sample i has entry i modulo m. Accuracy is measured where these are all classes in turn and
    the classifier knows them.
    """
    engine = Engine(model)
    results: dict[str, list[float]] = {"fid": [], "accuracy": []}
    left_out: dict[str, str] = {}
    for seed in seeds:
        first = seed * SEED_STRIDE
        numbered = SampleSet(condition, grid, plan, SamplingSettings(), TOGETHER, first, n=samples)
        images = decode_all(judge.tokenizer, draw_codes(engine, numbered, advance))
        features = extract_features(judge.classifier, images)
        found, missing = measure(["fid"], features, judge.real)
        results["fid"] += found.values()
        left_out |= missing
        if features.logits is None:
            left_out["accuracy"] = "the metric network knows no classes"
        else:
            labels = torch.arange(samples) % features.logits.shape[1]
            results["accuracy"].append(float((features.logits.argmax(1) == labels).double().mean()))
    if engine.forwards:
        results["forwards"] = [statistics.fmean(engine.forwards)]
    return results, left_out


def time_per_image(
    models: list[tuple[GridModel, str]], grid: tuple[int, int], images: int, conditions: Condition
) -> list[dict[str, float]]:
    """Milliseconds to decode one image at batch 1 without guidance, for each (model, plan), its conditions in turn.

    The models take turns image by image, so that other load on the machine hits all alike. The first `WARM_UP` images
    of each are not counted. Returns median, lower and upper quartile.
    """
    engines = [(Engine(model), plan) for model, plan in models]
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(WARM_UP + images):
        for (engine, plan), counted in zip(engines, times):
            condition = conditions.rows([turn % len(conditions)])
            started = time.perf_counter()
            engine.generate(condition, grid, plan, seeds=turn).cpu()
            counted.append(1000 * (time.perf_counter() - started))
    results = []
    for counted in times:
        kept = counted[WARM_UP:]
        low, middle, high = statistics.quantiles(kept, n=4) if len(kept) > 1 else kept * 3
        results.append({"median": middle, "lower_quartile": low, "upper_quartile": high})
    return results


def mean_gate(model: GridModel, batches: Iterable[Batch], grid: tuple[int, int]) -> Tensor:
    """Mean weight of the horizontal head (H, W) over the valid images of some batches, under the diagonal plan."""
    plan = model.make_plan("diagonal", *grid)
    total, n = torch.zeros(grid, dtype=torch.float64), 0  # (H, W)
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(model.device)
            gate = model.loss(moved.codes, model.backbone.condition_of(moved), plan)["gate"].cpu().double()  # (B, H, W)
            gate = gate if batch.valid is None else gate[batch.valid.cpu()]
            total, n = total + gate.sum(0), n + len(gate)
    return total / n
