"""What `flashar evaluate` and `flashar evaluate geneval` ask for themselves. Standard library only, for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashar_pl.options import (
    CodeOptions,
    EngineOptions,
    ModelOptions,
    SamplingSettings,
    Split,
    TextOptions,
    check_least,
)

Labels = Literal["balanced", "random"]
Crop = Literal["none", "centre"]
MEASURED = "evaluation/checkpoints.json"
"""In a run directory: the metrics of its kept checkpoints."""
BATCH_SIZE, GENEVAL_BATCH_SIZE = 32, 4
"""Samples decoded together where the user says nothing."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Samples and what they are compared with"""

    reference: str
    """The real images: an .npz with moments or images (ADM reference batches), a directory of images, or a directory of
    shards."""
    features: str
    """What turns images into features: the file of Inception weights, or a classifier's directory."""
    out: str | None = None
    """Directory of the results; new, or one where the same evaluation was stopped. Default: only with --run, its
    directory evaluation/."""
    run: str | None = None
    """Run directory in place of --checkpoint: every checkpoint in its checkpoints/ is measured."""
    num_samples: int = 50_000
    """Images to draw."""
    labels: Labels = "balanced"
    """balanced gives sample i the class i modulo the number of classes; random draws classes uniformly, as LlamaGen
    does."""
    metrics: str | None = None
    """Of fid, sfid, is, precision, recall, f1, kid, separated by commas. Default: all that features and reference
    allow."""
    seed: int = 0
    """Of the first sample; sample i uses seed + i."""
    resize: int | None = None
    """Side of the measured images, bicubic without antialiasing. Default: 256 for images of 384 pixels, otherwise the
    size they have."""
    split: Split = "test"
    """Which images of a reference that is shards."""
    reference_crop: Crop = "none"
    """What is done to a directory of reference images: none, they must be of the samples' size; or centre, the centre
    square at the samples' side, as `flashar tokenize images` and ADM's data preparation cut it."""
    min_samples: int | None = None
    """Fewest samples and reference images for FID and sFID. Default: more than they have features."""
    save_npz: bool = False
    """Also write the samples as samples.npz, for the ADM evaluator."""
    cache: str | None = None
    """Directory for computed reference statistics. Default: references/ in the user's cache directory."""

    def __post_init__(self) -> None:
        check_least(self, num_samples=1, resize=1, min_samples=2)


@dataclass(frozen=True)
class MeasuredModelOptions(ModelOptions):
    """Model"""

    checkpoint: str = ""
    """Lightning checkpoint, converted directory, official .pt or .safetensors file, or released directory. Default:
    none, with --run."""


@dataclass(frozen=True)
class DrawnModelOptions(ModelOptions):
    """Model"""

    checkpoint: str = ""
    """What draws the images, a checkpoint of any kind. Default: none, images in --out are scored."""


@dataclass(frozen=True)
class GenEvalOptions:
    """Images and their score"""

    out: str
    """Directory of the images and results."""
    prompts: str | None = None
    """GenEval's evaluation_metadata.jsonl, to draw images."""
    detector: str | None = None
    """Directory of a Mask2Former with COCO's classes, in transformers' format, to score images."""
    clip: str | None = None
    """Directory of CLIP ViT-L/14, in transformers' format, to score images."""
    num_images: int = 4
    """Images of each prompt."""
    seed: int = 0
    """Image j of prompt i uses seed + i * num_images + j."""

    def __post_init__(self) -> None:
        check_least(self, num_images=1)


@dataclass(frozen=True)
class Evaluation:
    """All that `flashar evaluate` was asked for. Plain values: it travels to other processes."""

    options: EvaluateOptions
    model: ModelOptions
    sampling: SamplingSettings
    engine: EngineOptions


@dataclass(frozen=True)
class GenEval:
    """All that `flashar evaluate geneval` was asked for."""

    options: GenEvalOptions
    model: DrawnModelOptions
    sampling: SamplingSettings
    text: TextOptions
    engine: EngineOptions


def batch_size(engine: CodeOptions, usual: int, n: int) -> int:
    """Samples decoded together. Raises ValueError for "auto"."""
    if engine.batch_size == "auto":
        raise ValueError(
            "batch_size is auto; expected a number: the last bits of a sample depend on it, so it must be the same on "
            "every machine."
        )
    return min(engine.batch_size or usual, n)
