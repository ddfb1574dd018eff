"""Measurements behind the report: quality of samples, time per image, mean gate.

Shapes: n samples, N images of a split, H x W grid, D features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.backbones import ClassIds
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.decoding import Engine
from flashar_pl.decoding.samples import SampleSet, draw_codes
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.extractor import extract_features
from flashar_pl.metrics.reference import ReferenceStatistics, reference_from_batches
from flashar_pl.metrics.table import measure
from flashar_pl.models import GridModel
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import Tokenizer, build_tokenizer

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
        return cls(classifier, build_tokenizer(manifest.tokenizer), reference_from_batches(classifier, images))


def split_images(manifest: Manifest, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w) uint8 and labels (n,) int64 of a split of class-conditional shards, evaluation crops."""
    reader = ShardReader(manifest, split)
    samples = reader.read(np.arange(len(reader)))
    images = build_tokenizer(manifest.tokenizer).decode(torch.from_numpy(samples.codes))
    return images, torch.from_numpy(samples.labels)


def sample_quality(
    model: GridModel,
    plan: str,
    grid: tuple[int, int],
    judge: Judge,
    samples: int,
    seeds: list[int],
    advance: Callable[[int], Any],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """ "fid" and "accuracy" of n samples for each sample seed, and why a seed has none (the last one's reason).

    Sample i has class i modulo the number of classes.
    """
    engine = Engine(model)
    labels = torch.arange(samples) % int(judge.classifier.num_classes or 1)
    results: dict[str, list[float]] = {"fid": [], "accuracy": []}
    left_out: dict[str, str] = {}
    for seed in seeds:
        numbered = SampleSet(ClassIds(labels), grid, plan, SamplingSettings(), TOGETHER, seed * SEED_STRIDE)
        images = judge.tokenizer.decode(draw_codes(engine, numbered, advance))
        features = extract_features(judge.classifier, images)
        assert features.logits is not None
        found, missing = measure(["fid"], features, judge.real)
        results["fid"] += found.values()
        left_out |= missing
        results["accuracy"].append(float((features.logits.argmax(1) == labels).double().mean()))
    return results, left_out


def time_per_image(models: list[tuple[GridModel, str]], grid: tuple[int, int], images: int) -> list[dict[str, float]]:
    """Milliseconds to decode one image at batch 1 without guidance, for each (model, plan).

    The models take turns image by image, so that other load on the machine hits all alike. The first `WARM_UP` images
    of each are not counted. Returns median, lower and upper quartile.
    """
    engines = [(Engine(model), plan) for model, plan in models]
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(WARM_UP + images):
        for (engine, plan), counted in zip(engines, times):
            condition = engine.model.backbone.conditioning.example(10).rows([turn % 10])  # ten classes in turn
            started = time.perf_counter()
            engine.generate(condition, grid, plan, seeds=turn).cpu()
            counted.append(1000 * (time.perf_counter() - started))
    results = []
    for counted in times:
        kept = counted[WARM_UP:]
        low, middle, high = statistics.quantiles(kept, n=4) if len(kept) > 1 else kept * 3
        results.append({"median": middle, "lower_quartile": low, "upper_quartile": high})
    return results


def mean_gate(model: GridModel, manifest: Manifest, split: str, batch_size: int = 256) -> Tensor:
    """Mean weight of the horizontal head (H, W) over the images of a split, under the diagonal plan."""
    reader = ShardReader(manifest, split)
    plan = model.make_plan("diagonal", *manifest.grid)
    total = torch.zeros(manifest.grid, dtype=torch.float64)  # (H, W)
    with torch.no_grad():
        for part in np.array_split(np.arange(len(reader)), -(-len(reader) // batch_size)):
            read = reader.read(part)
            losses = model.loss(torch.from_numpy(read.codes), torch.from_numpy(read.labels), plan)
            total += losses["gate"].double().sum(0)
    return total / len(reader)
