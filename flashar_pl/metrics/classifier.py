"""A small classifier: features for FID where Inception's say nothing, and the class accuracy of samples.

It learns the classes, or, where there are none to tell apart, which way up an image is (Gidaris et al. 2018).

Shapes: n images or B of a batch, h x w pixels, D features, C classes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.files import replacing, write_json
from flashar_pl.metrics.extractor import FeatureExtractor, Features, check_images, device_of, state_digest
from flashar_pl.numerics import without_memory
from flashar_pl.tensor_files import read_tensors, save_checked
from flashar_pl.text_files import read_json, reason

CONFIG_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"
SMALLEST_IMAGE = 4
"""Pixels of a side: what one 2 x 2 pooling leaves something of."""
LARGEST_IMAGE, FINAL_SIDE = 64, 8
"""Shorter sides: larger images are averaged down to less than twice this, and halved until about this is left."""
BATCH, RATE = 64, 3e-3
"""Images of a training step, and the highest learning rate."""
EPOCHS, LEAST_STEPS = 20, 150
"""Passes over the images unless told, more where that is less than so many steps."""


class ClassifierFeatures(FeatureExtractor):
    """Convolutions, a hidden layer of D units (the features) and a linear layer of C logits."""

    def __init__(
        self, image_size: tuple[int, int], num_classes: int | None, num_features: int = 32, poolings: int = 1
    ) -> None:
        """num_classes: None = it tells the turns of an image. poolings: how often the sides are halved."""
        super().__init__()
        height, width = image_size
        outputs = len(turns_of(image_size)) if num_classes is None else num_classes
        if min(height, width) < SMALLEST_IMAGE or outputs < 2 or num_features < 1:
            raise ValueError(
                f"a classifier of {image_size} images, {num_classes} classes and {num_features} features; expected at "
                f"least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, 2 classes and 1 feature."
            )
        self.image_size = (height, width)
        self.num_classes, self.num_features, self.poolings = num_classes, num_features, poolings
        self.shrink = max(1, min(image_size) // LARGEST_IMAGE)
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
        ]
        for _ in range(poolings):
            layers += [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        rows, columns = ((side // self.shrink) >> poolings for side in self.image_size)
        self.hidden = nn.Linear(32 * rows * columns, num_features)
        self.head = nn.Linear(num_features, outputs)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) after the ReLU and logits (B, C), of classes or turns, of uint8 images (B, 3, h, w)."""
        if tuple(check_images(images).shape[2:]) != self.image_size:
            raise ValueError(
                f"images are {tuple(images.shape[2:])}; expected {self.image_size}, as the classifier's "
                "(a reference of pictures of other sizes: --reference-crop centre)."
            )
        x = images.to(self.hidden.weight.dtype) / 127.5 - 1  # (B, 3, h, w)
        x = F.avg_pool2d(x, self.shrink) if self.shrink > 1 else x
        features = F.relu(self.hidden(self.convolutions(x).flatten(1)))  # (B, D)
        return features, self.head(features)

    def extract(self, images: Tensor) -> Features:
        """Features (B, D) and, of a classifier of classes, logits (B, C) of uint8 images (B, 3, h, w)."""
        features, logits = self.outputs(images)
        return Features(features, None, None if self.num_classes is None else logits)

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Most likely class ids, or turns, (n,) int64 of uint8 images (n, 3, h, w), on the CPU."""
        device = device_of(self)
        parts = check_images(images).split(batch_size)
        return torch.cat([self.outputs(part.to(device))[1].argmax(dim=1).cpu() for part in parts])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of uint8 images (n, 3, h, w) whose predicted class equals labels (n,)."""
        return float((self.predict(images) == labels).double().mean())

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return f"classifier-{state_digest(self.state_dict())}"

    def save(self, directory: str | Path) -> Path:
        """Write classifier.safetensors and classifier.json to a directory, made if missing; nothing is overwritten."""
        folder = Path(directory)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} exists; choose another directory or remove the file.")
        with replacing(folder / WEIGHTS_FILE) as part:
            save_checked(self.state_dict(), part)
        names = ("image_size", "num_classes", "num_features", "poolings")
        sizes = {name: getattr(self, name) for name in names}
        write_json(folder / CONFIG_FILE, {"kind": "classifier", **sizes})
        return folder

    @classmethod
    def load(cls, directory: str | Path) -> ClassifierFeatures:
        """Read what `save` wrote, the sizes compared with the tensors before any memory is taken. Raises ValueError
        where a file is missing or does not fit."""
        folder = Path(directory)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no classifier in {folder}: {name} is missing; make one: flashar classifier --data SHARDS --out "
                    f"{shlex.quote(str(folder))}"
                )
        config, tensors = read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
        try:
            height, width = config["image_size"]
            if (poolings := config.get("poolings", 1)) > len(tensors):
                raise ValueError(f"{folder / CONFIG_FILE} has {poolings} poolings for {len(tensors)} tensors.")
            with without_memory():
                model = cls((height, width), config["num_classes"], config["num_features"], poolings)
            model.load_state_dict(tensors, assign=True)
            model.float()
        except (KeyError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"the classifier in {folder} cannot be read: {reason(error)}.") from error
        return model.requires_grad_(False).eval()


def turns_of(image_size: tuple[int, int]) -> list[int]:
    """The quarter turns that keep the size of an image (h, w)."""
    return [0, 1, 2, 3] if image_size[0] == image_size[1] else [0, 2]


def turned(images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w), each turned at random, and the numbers (n,) of their turns in `turns_of`."""
    turns = turns_of((images.shape[2], images.shape[3]))
    drawn = np.random.RandomState(seed).randint(len(turns), size=len(images))
    parts = [image.rot90(turns[number], (1, 2)) for image, number in zip(images, drawn.tolist(), strict=True)]
    return torch.stack(parts), torch.as_tensor(drawn, dtype=torch.int64)


def train_classifier(
    images: Tensor,
    labels: Tensor | None,
    *,
    num_classes: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda n: None,
) -> ClassifierFeatures:
    """Train a classifier on uint8 images (n, 3, h, w) and labels (n,) int64; on the CPU, the same for the same seed.

    AdamW with a one-cycle cosine learning rate; the caller's random state is untouched. labels: None = it learns which
    way up an image is. epochs: None = `EPOCHS`, or what `LEAST_STEPS` needs. advance: called after every step.

    Raises:
        ValueError: images are not uint8 (n, 3, h, w), or too small, or there are fewer than 2 classes.
    """
    images, labels = check_images(images).cpu(), None if labels is None else labels.cpu()
    classes = None if labels is None else int(labels.max()) + 1 if num_classes is None else num_classes
    order = np.random.RandomState(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        height, width = images.shape[2:]
        poolings = max(1, round(math.log2(min(height, width, 2 * LARGEST_IMAGE - 1) / FINAL_SIDE)))
        model = ClassifierFeatures((height, width), classes, poolings=poolings)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
        passes, steps = passes_and_steps(len(images), epochs)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=RATE, total_steps=steps)
        for i in range(passes):
            shown, wanted = (images, labels) if labels is not None else turned(images, seed + i)
            assert wanted is not None
            for part in torch.as_tensor(order.permutation(len(images))).split(BATCH):
                logits = model.outputs(shown[part])[1]  # (B, C)
                optimiser.zero_grad(set_to_none=True)
                F.cross_entropy(logits, wanted[part]).backward()
                optimiser.step()
                schedule.step()
                advance(1)
    return model.requires_grad_(False).eval()


def passes_and_steps(n: int, epochs: int | None) -> tuple[int, int]:
    """Passes over n images, and steps in all."""
    steps = -(-n // BATCH)
    passes = max(EPOCHS, -(-LEAST_STEPS // steps)) if epochs is None else epochs
    return passes, passes * steps
