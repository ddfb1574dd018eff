"""A small classifier for tiny images: demo features for FID, and the class accuracy of samples.

Shapes: n images or B of a batch, h x w pixels, D features, C classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flashar_pl.files import replacing, write_json
from flashar_pl.metrics.extractor import FeatureExtractor, Features, check_images, device_of, state_digest
from flashar_pl.tensor_files import read_tensors
from flashar_pl.text_files import read_json

CONFIG_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"
SMALLEST_IMAGE = 4
"""Pixels of a side: what one 2 x 2 pooling leaves something of."""
BATCH, RATE = 64, 3e-3
"""Images of a training step, and the highest learning rate."""


class ClassifierFeatures(FeatureExtractor):
    """Three convolutions, a hidden layer of D units (the features) and a linear layer of C logits."""

    def __init__(self, image_size: tuple[int, int], num_classes: int, num_features: int = 32) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width) < SMALLEST_IMAGE or num_classes < 2 or num_features < 1:
            raise ValueError(
                f"a classifier of {image_size} images, {num_classes} classes and {num_features} features; expected at "
                f"least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, 2 classes and 1 feature."
            )
        self.image_size = (height, width)
        self.num_classes, self.num_features = num_classes, num_features
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.hidden = nn.Linear(32 * (height // 2) * (width // 2), num_features)
        self.head = nn.Linear(num_features, num_classes)

    def extract(self, images: Tensor) -> Features:
        """Features (B, D) after the ReLU and logits (B, C) of uint8 images (B, 3, h, w)."""
        if tuple(check_images(images).shape[2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}; expected {self.image_size}, as the classifier's.")
        x = self.convolutions(images.to(self.hidden.weight.dtype) / 127.5 - 1)  # (B, 32, h/2, w/2)
        features = F.relu(self.hidden(x.flatten(1)))  # (B, D)
        return Features(features, None, self.head(features))

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Most likely class ids (n,) int64 of uint8 images (n, 3, h, w), on the CPU."""
        device = device_of(self)
        features = (self.extract(part.to(device)) for part in check_images(images).split(batch_size))
        return torch.cat([found.logits.argmax(dim=1).cpu() for found in features if found.logits is not None])

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
            save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, part)
        sizes = {"image_size": self.image_size, "num_classes": self.num_classes, "num_features": self.num_features}
        write_json(folder / CONFIG_FILE, {"kind": "classifier", **sizes})
        return folder

    @classmethod
    def load(cls, directory: str | Path) -> ClassifierFeatures:
        """Read what `save` wrote. Raises ValueError where a file is missing or does not fit."""
        folder = Path(directory)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"no classifier in {folder}: {name} is missing; flashar classifier makes it.")
        config = read_json(folder / CONFIG_FILE)
        try:
            height, width = config["image_size"]
            model = cls((height, width), config["num_classes"], config["num_features"])
            model.load_state_dict(read_tensors(folder / WEIGHTS_FILE))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the classifier in {folder} cannot be read: {str(error)[:400]}.") from error
        return model.requires_grad_(False).eval()


def train_classifier(
    images: Tensor, labels: Tensor, *, num_classes: int | None = None, epochs: int = 20, seed: int = 0
) -> ClassifierFeatures:
    """Train a classifier on uint8 images (n, 3, h, w) and labels (n,) int64; on the CPU, the same for the same seed.

    AdamW with a one-cycle cosine learning rate; the caller's random state is untouched.

    Raises:
        ValueError: images are not uint8 (n, 3, h, w), or too small, or there are fewer than 2 classes.
    """
    images, labels = check_images(images).cpu(), labels.cpu()
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    order = np.random.RandomState(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        height, width = images.shape[2:]
        model = ClassifierFeatures((height, width), classes)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
        steps = epochs * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=RATE, total_steps=steps)
        for _ in range(epochs):
            for part in torch.as_tensor(order.permutation(len(images))).split(BATCH):
                logits = model.extract(images[part]).logits  # (B, C)
                assert logits is not None
                optimiser.zero_grad(set_to_none=True)
                F.cross_entropy(logits, labels[part]).backward()
                optimiser.step()
                schedule.step()
    return model.requires_grad_(False).eval()
