"""Small JPEGs and a tiny VQ tokenizer for tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def make_images(root: Path, classes: int = 3, each: int = 9, seed: int = 0) -> Path:
    """Blurred noise as small JPEGs of various sizes."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (root / f"n{c}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            size = [int(v) for v in rng.integers(18, 60, 2)]
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(
                root / f"n{c}" / f"{i}.JPEG", quality=95
            )
    return root


def vq_state() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "golden" / "vq" / "vq_tiny.npz") as arrays:
        return {name[3:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("sd/")}
