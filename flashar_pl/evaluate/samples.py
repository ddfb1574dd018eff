"""What samples an evaluation draws, and what has to be loaded to draw them.

Shapes: n samples, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from flashar_pl.backbones import ClassIds
from flashar_pl.checkpoints.opening import Source, check_plan, check_top_k, open_checkpoint
from flashar_pl.decoding import Engine
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.samples import SampleSet, check_resize
from flashar_pl.evaluate.options import BATCH_SIZE, Evaluation, Labels, batch_size
from flashar_pl.metrics.extractor import FeatureExtractor
from flashar_pl.metrics.features import load_extractor
from flashar_pl.numerics import float64_device
from flashar_pl.tokenizers import Tokenizer

HIGH_SIDE, EVALUATION_SIDE = 384, 256
"""Numbers of published models that draw 384 pixels are measured at 256 (LlamaGen)."""


@dataclass(frozen=True)
class Bench:
    """What one rank draws samples with, and which."""

    source: Source
    engine: Engine
    tokenizer: Tokenizer
    extractor: FeatureExtractor
    samples: SampleSet
    resize: int | None
    """Side that images are resized to; None = they are not."""
    size: tuple[int, int]
    """(h, w) of the measured images."""

    @classmethod
    def load(cls, asked: Evaluation, device: torch.device) -> Bench:
        """Load everything onto one device. Raises ValueError for whatever does not exist or does not fit."""
        options, n = asked.options, asked.options.num_samples
        if float64_device(device) != device:
            raise ValueError(f"metrics are computed in float64, which {device.type} does not have; use --device cpu.")
        extractor = load_extractor(options.features)
        source = open_checkpoint(asked.model, replace(asked.engine, device=str(device)))
        grid, takes = source.need_grid(), source.model.backbone.conditioning
        if takes.kind != "class":
            raise ValueError("evaluate draws samples by class; this model is conditioned on text.")
        sampling = asked.sampling.of(source.model.backbone.published_cfg_scale)
        check_top_k(source.model, sampling.top_k)
        plan = check_plan(source.model, asked.engine.plan, grid)
        decoder = source.matching_tokenizer(str(device), asked.engine.pixel_dtype)
        resize, size = image_size(decoder, grid, options.resize)
        engine = build_engine(source, asked.engine, plan)
        labels = torch.tensor(sample_labels(options.labels, n, takes.size, options.seed))
        size_of_batch = batch_size(asked.engine, BATCH_SIZE, n)
        samples = SampleSet(ClassIds(labels), grid, plan, sampling, size_of_batch, options.seed)
        return cls(source, engine, decoder, extractor.to(device), samples, resize, size)


def image_size(tokenizer: Tokenizer, grid: tuple[int, int], resize: int | None) -> tuple[int | None, tuple[int, int]]:
    """The side to resize to (None = not at all), or ValueError, and the size (h, w) of the measured images."""
    decoded = tokenizer.image_size(grid)
    if resize is None and decoded == (HIGH_SIDE, HIGH_SIDE):
        resize = EVALUATION_SIDE
    if resize is None or decoded == (resize, resize):
        return None, decoded
    check_resize(tokenizer, grid, resize)
    return resize, (resize, resize)


def sample_labels(kind: Labels, n: int, num_classes: int, seed: int) -> list[int]:
    """Classes of n samples. Balanced ones alternate, so that every run of consecutive samples is balanced too."""
    if kind == "balanced":
        return [i % num_classes for i in range(n)]
    return np.random.default_rng((seed, num_classes)).integers(num_classes, size=n).tolist()
