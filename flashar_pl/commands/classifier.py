"""`flashar classifier`: the small network whose features stand in for Inception's on tiny images."""

from __future__ import annotations

from pathlib import Path

from flashar_pl.files import require_new


def classifier(*, data: str, out: str, epochs: int = 20, seed: int = 0) -> Path:
    """Train a small classifier on the images of a data set, for FID and class accuracy of samples.

    Inception is useless on images of a few pixels. This classifier sees the training split only; prints its accuracy
    on the test split. Takes seconds on one CPU core for the embedded digits.

    Example:
        flashar classifier --data data/digits --out runs/demo/classifier

    Args:
        data: directory of class-conditional shards with their manifest.json.
        out: directory to make; it must not exist.
        epochs: passes over the training images.
        seed: of its initial weights and sample order.
    """
    from flashar_pl.data.shards import Manifest
    from flashar_pl.evaluate.quality import split_images
    from flashar_pl.metrics.classifier import train_classifier

    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; expected 1 or more.")
    target = require_new(out, "classifier")
    manifest = Manifest.load(data)
    if manifest.condition.kind != "class":
        raise ValueError(f"the shards at {data} have the condition {manifest.condition.kind!r}; expected 'class'.")
    images, labels = split_images(manifest, "train")
    model = train_classifier(images, labels, num_classes=manifest.condition.num_classes, epochs=epochs, seed=seed)
    accuracy = model.accuracy(*split_images(manifest, "test"))
    model.save(target)
    print(f"classifier: accuracy {accuracy:.4f} on the test split of {manifest.name}; wrote {target}")
    return target
