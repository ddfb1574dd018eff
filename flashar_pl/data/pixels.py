"""Images that are tokenised while training: one sample as pixels, and batches of them read exactly or streamed.

Shapes: b images of a device's part of a global batch, h x w pixels, H x W grid, S side before cropping, K crops.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashar_pl.backbones.condition import ClassIds, Condition, Prompts
from flashar_pl.data.batches import TextEncoder
from flashar_pl.data.images import centre_crop, fit, views
from flashar_pl.data.order import TrainingOrder
from flashar_pl.data.sources import IMAGE_MEMBERS, Source, condition_of
from flashar_pl.data.tally import Tally
from flashar_pl.image_files import Unreadable, open_rgb

BAD_SHARE, BAD_START = 0.01, 100
"""A reader gives up when more than this share of its samples is unreadable, once it has seen so many."""
Row = tuple[np.ndarray, Any]
"""Pixels (3, h, w) uint8, and class id or prefix ids."""


@dataclass
class ImageBatch:
    """A batch before it is tokenised."""

    pixels: Tensor
    """(b, 3, h, w) uint8."""
    condition: Condition
    index: Tensor | None = None
    """(b,) int64 sample numbers; None = unknown."""

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> ImageBatch:
        return ImageBatch(self.pixels.to(device), self.condition.to(device), self.index)


@dataclass(frozen=True)
class Prepare:
    """Bytes of an image and its condition -> a row of a batch."""

    height: int
    width: int
    crop_range: float
    num_classes: int | None
    """None = captions."""
    text_encoder: TextEncoder | None = None

    @property
    def crops(self) -> int:
        """K, of which one is shown."""
        if self.num_classes is None or self.height != self.width:
            return 1
        return 10 if int(self.height * self.crop_range) > self.height else 2

    def __call__(self, data: bytes, condition: int | str, crop: int) -> Row:
        """Raises `Unreadable`."""
        image = open_rgb(data)
        value: Any = condition
        if isinstance(condition, str):
            assert self.text_encoder is not None
            value = self.text_encoder(condition)
        if self.crops == 1:
            return fit(image, self.height, self.width), value
        square = torch.from_numpy(centre_crop(image, int(self.height * self.crop_range)))[None]  # (1, 3, S, S)
        return views(square, self.crops, self.height)[0, crop].numpy(), value

    def collate(self, rows: list[Row]) -> ImageBatch:
        """Rows as one batch."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in rows]))  # (b, 3, h, w)
        values = [value for _, value in rows]
        return ImageBatch(pixels, Prompts(values) if self.num_classes is None else ClassIds(torch.tensor(values)))


class _Tolerance:
    """Counts unreadable samples. Raises ValueError once they are too many."""

    def __init__(self) -> None:
        self.seen = self.bad = 0

    def skip(self, where: str, error: Unreadable) -> None:
        """Announce one."""
        self.bad += 1
        warnings.warn(f"skipped {where}: {error}", stacklevel=2)
        if self.seen >= BAD_START and self.bad > BAD_SHARE * self.seen:
            raise ValueError(f"{self.bad} of {self.seen} samples cannot be read; the last one: {where}: {error}")


@dataclass
class ImageBatches(Dataset):
    """(epoch, g) -> this rank's part of global training batch g, in the order of `TrainingOrder`: the exact way.

    In place of a sample that cannot be read comes the next one that can.
    """

    source: Source
    prepare: Prepare
    order: TrainingOrder
    rank: int = 0
    ranks: int = 1
    reshuffle: bool = True

    def __post_init__(self) -> None:
        self._tolerance = _Tolerance()
        bad = self.source.known_bad()
        if len(bad) > BAD_SHARE * len(self.source):
            try:
                self.source.read(bad[0])
            except Unreadable as error:
                first = f"{self.source.where(bad[0])}: {error}"
                raise ValueError(f"{len(bad)} of {len(self.source)} samples cannot be used, such as {first}") from error

    def __len__(self) -> int:
        return len(self.order)

    def identity(self) -> dict[str, Any]:
        """What the order depends on; plain integers and strings."""
        return self.order.settings | {"images": self.source.fingerprint()}

    def __getitem__(self, item: tuple[int, int]) -> ImageBatch:
        epoch = item[0] if self.reshuffle else 0
        index = self.order.batch(epoch, item[1], self.rank, self.ranks)
        crops = self.order.crops(epoch, index, self.prepare.crops)
        found = [self._row(number, crop) for number, crop in zip(index.tolist(), crops.tolist(), strict=True)]
        batch = self.prepare.collate([row for row, _ in found])
        batch.index = torch.tensor([number for _, number in found])
        return batch

    def _row(self, number: int, crop: int) -> tuple[Row, int]:
        """The row of a sample, or of the next one that can be read, and its number."""
        for _ in range(len(self.source)):
            self._tolerance.seen += 1
            try:
                return self.prepare(*self.source.read(number), crop), number
            except Unreadable as error:
                self._tolerance.skip(self.source.where(number), error)
                number = (number + 1) % len(self.source)
        raise ValueError("No sample can be read; see the warnings.")


@dataclass(frozen=True)
class ImageRows:
    """webdataset's samples (jpg + cls, or jpg + txt) -> rows; unreadable ones are left out: the streamed way."""

    prepare: Prepare
    classes: dict[str, int] | None = None
    """Class names, where the tars hold them."""
    tally: Tally = field(default_factory=Tally)
    """Of the `Stream` that it is a part of."""

    def __call__(self, samples: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[Row]:
        tolerance = _Tolerance()
        for sample in samples:
            tolerance.seen += 1
            try:
                yield self.prepare(*self._read(sample), rng.randrange(self.prepare.crops))
            except Unreadable as error:
                self.tally.count("unreadable")
                tolerance.skip(f"{sample['__url__']}: {sample['__key__']}", error)

    def _read(self, sample: dict[str, Any]) -> tuple[bytes, int | str]:
        classes = self.prepare.num_classes
        data = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
        given = sample.get("txt" if classes is None else "cls")
        if data is None or given is None:
            raise Unreadable("no image or no condition in the record")
        return data, condition_of(given, self.classes, classes)
