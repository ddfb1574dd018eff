"""What samples an evaluation draws, and what has to be loaded to draw them.

Shapes: n samples, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.opening import Source, open_checkpoint
from flashar_pl.decoding.build import build_engine
from flashar_pl.devices import find_device
from flashar_pl.options import Dtype, EngineOptions, ModelOptions, Runner, WeightFormat, Weights

if TYPE_CHECKING:
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.samples import SampleSet
    from flashar_pl.metrics.extractor import FeatureExtractor
    from flashar_pl.models import GridModel
    from flashar_pl.tokenizers import Tokenizer

LLAMAGEN_SIDE, EVALUATION_SIDE = 384, 256
"""LlamaGen measures its 384-pixel models at 256 pixels."""


@dataclass(frozen=True)
class Job:
    """What a process needs to know to draw its part. Plain values: it travels to other processes."""

    out: str
    checkpoint: str
    weights: Weights
    n_head: int | None
    branch_layer: int | None
    grid: tuple[int, int]
    tokenizer: dict[str, Any]
    dtype: Dtype
    runner: Runner
    weight_format: WeightFormat
    plan: str
    sampling: dict[str, Any]
    labels: list[int]
    batch_size: int
    seed: int
    features: str
    side: int | None
    keep_images: bool
    threads: int
    """CPU threads of every process: the last bit of a sum on a CPU depends on it."""

    def samples(self) -> SampleSet:
        """The numbered samples; numbers behind the last repeat its class."""
        import torch

        from flashar_pl.decoding.samples import SampleSet
        from flashar_pl.sampling import SamplingSettings

        labels = torch.tensor(self.labels)  # (n,)
        return SampleSet(
            lambda numbers: labels[torch.tensor(numbers).clamp(max=len(labels) - 1)],
            len(labels),
            self.grid,
            self.plan,
            SamplingSettings(**self.sampling),
            self.batch_size,
            self.seed,
        )


@dataclass(frozen=True)
class Bench:
    """Everything loaded on one device."""

    source: Source
    engine: Engine
    tokenizer: Tokenizer
    extractor: FeatureExtractor


def load_bench(
    checkpoint: str,
    *,
    weights: Weights,
    n_head: int | None,
    branch_layer: int | None,
    grid: str | tuple[int, int] | None,
    tokenizer: str | dict[str, Any] | None,
    dtype: Dtype,
    plan: str | None,
    runner: Runner,
    weight_format: WeightFormat,
    features: str,
    device: str,
) -> Bench:
    """Load model, tokenizer and feature extractor onto one device."""
    from flashar_pl.metrics.features import load_extractor

    extractor = load_extractor(features)
    options = ModelOptions(checkpoint, weights, n_head, tokenizer, branch_layer=branch_layer, grid=grid)  # type: ignore[arg-type]
    engine_options = EngineOptions(device, dtype, runner=runner, weight_format=weight_format)
    source = open_checkpoint(options, engine_options)
    source.need_grid()
    decoder = source.matching_tokenizer(device)
    engine = build_engine(source, engine_options, plan or source.model.plan_name)
    return Bench(source, engine, decoder, extractor.to(find_device(device)))


def class_count(model: GridModel) -> int:
    """Number of classes of a class-conditional model. Raises ValueError for any other model."""
    takes = model.backbone.conditioning
    if takes.kind != "class":
        raise ValueError("evaluate draws samples by class; this model is conditioned on text.")
    return takes.size


def image_size(bench: Bench, resize: int | None) -> tuple[int | None, tuple[int, int]]:
    """The side to resize to (None = not at all) and the size (h, w) of the measured images.

    Raises:
        ValueError: images that cannot be resized.
    """
    from flashar_pl.decoding.samples import check_resize

    grid, scale = bench.source.need_grid(), bench.tokenizer.downsample
    decoded = (grid[0] * scale, grid[1] * scale)
    if resize is None and decoded == (LLAMAGEN_SIDE, LLAMAGEN_SIDE):
        resize = EVALUATION_SIDE
    if resize is None or decoded == (resize, resize):
        return None, decoded
    check_resize(bench.tokenizer, grid, resize)
    return resize, (resize, resize)


def sample_labels(kind: str, n: int, num_classes: int, seed: int) -> list[int]:
    """Classes of n samples. Balanced ones alternate, so that every run of consecutive samples is balanced too."""
    import numpy as np

    if kind == "balanced":
        return [i % num_classes for i in range(n)]
    return np.random.default_rng((seed, num_classes)).integers(num_classes, size=n).tolist()


def absolute(path: str | Path) -> str:
    """A path that other processes understand too."""
    return str(Path(path).expanduser().resolve())
