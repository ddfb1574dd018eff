"""Pixels to codes on the tokenizer's device; which tokenizer and weights made the codes of some shards.

Shapes: n images, K crops of each, S side before cropping, s side of a crop, H x W grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.checkpoints.named_paths import IN_TOKENIZER, refusal
from flashar_pl.data.images import views
from flashar_pl.data.manifest import FILE_NAME, Manifest
from flashar_pl.text_files import read_field
from flashar_pl.tokenizers import Tokenizer, build_tokenizer


@dataclass
class ImageEncoder:
    """Images (n, 3, h, w) uint8 -> codes (n, K, H, W) int64."""

    tokenizer: Tokenizer
    device: torch.device
    crops: int = 1
    """K, as in `views`."""
    size: int = 0
    """Of ten crops, their side s."""
    preview: Callable[[int, int], tuple[int, int] | None] = lambda height, width: None
    """Grid of the preview of an image of H x W codes; None = it has none."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        crops = views(torch.from_numpy(images).to(self.device), self.crops, self.size)  # (n, K, 3, h, w)
        try:
            codes = self.tokenizer.encode(crops.flatten(0, 1))  # (n K, H, W)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{crops.shape[0] * crops.shape[1]} crops of {crops.shape[-2]} x {crops.shape[-1]} pixels do not fit "
                f"into the memory of {self.device}. Use a smaller --batch-size and run the same command again: it "
                "continues."
            ) from error
        return codes.unflatten(0, crops.shape[:2]).cpu().numpy()

    def previews(self, images: np.ndarray, grid: tuple[int, int]) -> np.ndarray | None:
        """Codes (n, K, h, w) int64 of the same images (n, 3, h, w) uint8, made as small as their previews."""
        if (smaller := self.preview(*grid)) is None:
            return None
        return self(shrunk(torch.from_numpy(images), smaller, self.tokenizer).numpy())


def shrunk(images: Tensor, grid: tuple[int, int], tokenizer: Tokenizer) -> Tensor:
    """Images (n, 3, h, w) uint8, as small as a grid of codes is."""
    size = [side * tokenizer.downsample for side in grid]
    pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def weights_hash(tokenizer: Tokenizer) -> str:
    """A hash of every tensor of a tokenizer: equal for equal weights, in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in tokenizer.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def with_weights(manifest: Manifest, weights: str) -> Manifest:
    """A manifest with the tokenizer's file or directory that the user types."""
    kept = {key: value for key, value in manifest.tokenizer.items() if key not in IN_TOKENIZER}
    return replace(manifest, tokenizer=kept | {"weights": weights}, strange=frozenset())


def check_own(manifest: Manifest, advice: str) -> None:
    """Raises ValueError where another user's manifest names the files of its tokenizer; advice: what to do then."""
    for path in sorted(manifest.strange):
        raise refusal(f"{FILE_NAME} of {manifest.root}", "tokenizer", path, advice)


def decoder_of(manifest: Manifest) -> Tokenizer:
    """The tokenizer of some shards, for commands that take none. Raises ValueError as `check_own`."""
    check_own(manifest, f"copy it into {manifest.root} and write its name there into {FILE_NAME}")
    return build_tokenizer(manifest.tokenizer)


def tokenizer_of(manifest: Manifest, weights: str | None, option: str) -> Tokenizer:
    """The tokenizer of some shards; weights: its file, where that has moved; option: how a person gives it.

    Raises:
        ValueError: its weights are not there, or it has another number of codes.
    """
    manifest = manifest if weights is None else with_weights(manifest, weights)
    check_own(manifest, f"add {option} FILE")
    file = manifest.tokenizer.get("weights", "")
    if file is None or (file and not Path(str(file)).expanduser().exists()):
        raise ValueError(f"The tokenizer's weights {file} are not there; add {option} FILE.")
    tokenizer = build_tokenizer(manifest.tokenizer)
    if tokenizer.vocabulary != manifest.vocabulary:
        raise ValueError(
            f"The shards at {manifest.root} hold codes of a vocabulary of {manifest.vocabulary}, their tokenizer has "
            f"{tokenizer.vocabulary}: it is not the one that made them. Add {option} FILE."
        )
    return tokenizer


def check_weights(out: Path, own: str | None) -> None:
    """Raises ValueError if a report of `flashar tokenize` in `out` notes another hash of weights than `own`."""
    for report in sorted(out.glob("tokenize-*.json")):
        noted = read_field(report, "settings", dict).get("weights_hash")
        if own is not None and noted is not None and noted != own:
            raise ValueError(
                f"The codes that {report} describes were made with other weights of the tokenizer than this command "
                "has; use the same file."
            )
