"""`flashar classifier`: the small network whose features stand in for Inception's on tiny images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashar_pl.console import progress_bar
from flashar_pl.files import require_new

if TYPE_CHECKING:
    from flashar_pl.data.shards import Manifest
    from flashar_pl.metrics.classifier import ClassifierFeatures


def classifier(*, data: str, out: str, epochs: int | None = None, seed: int = 0) -> Path:
    """Train a small classifier on the images of a data set, for FID and class accuracy of samples.

    Inception is useless on images of a few pixels. This classifier sees the training split only; prints its accuracy
    on the test split. Images without classes, or of one class, teach it which way up an image is: its features serve
    FID, and there is no class accuracy. Takes seconds on one CPU core for the embedded digits, minutes for 64 pixels.

    Example:
        flashar classifier --data data/digits --out runs/demo/classifier

    Args:
        data: directory of shards with their manifest.json.
        out: directory to make; it must not exist.
        epochs: passes over the training images. Default: 20, more where that is less than 150 steps.
        seed: of its initial weights and sample order.
    """
    from flashar_pl.data.shards import Manifest

    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; expected 1 or more.")
    target = require_new(out, "classifier")
    model = learn(Manifest.load(data), epochs, seed)
    model.save(target)
    print(f"wrote {target}")
    return target


def learn(manifest: Manifest, epochs: int | None = None, seed: int = 0) -> ClassifierFeatures:
    """A classifier of the training images of some shards, of their classes or, without, of their turns."""
    from flashar_pl.evaluate.quality import split_images
    from flashar_pl.metrics.classifier import passes_and_steps, train_classifier, turned

    classes = manifest.condition.num_classes or 1
    images, labels = split_images(manifest, "train")
    if classes < 2:
        labels = None
    steps = passes_and_steps(len(images), epochs)[1]
    with progress_bar(steps, "step") as advance:
        model = train_classifier(images, labels, num_classes=classes, epochs=epochs, seed=seed, advance=advance)
    images, wanted = split_images(manifest, "test")
    if labels is None or wanted is None:
        images, wanted = turned(images, seed)
    what = "of turned images " if labels is None else ""
    print(f"classifier: accuracy {model.accuracy(images, wanted):.4f} {what}on the test split of {manifest.name}")
    return model
