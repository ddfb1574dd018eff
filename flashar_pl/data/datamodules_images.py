"""Training on WebDataset tars of images without shards of codes: read by webdataset, tokenised on the training device.

What this gives up against `CodesDataModule` is listed at the class.

Shapes: b images of a device's part of a global batch, h x w pixels, H x W grid, S side before cropping.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import _shuffle
from webdataset.tariterators import tarfile_samples

from flashar_pl.backbones.condition import Batch, ClassIds, Condition, Prompts
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.images import Unreadable, centre_crop, fit, open_rgb, ten_crop, with_mirror
from flashar_pl.data.loader import TextEncoder
from flashar_pl.data.order import check_cut, permutation, stream
from flashar_pl.data.sources import IMAGE_MEMBERS
from flashar_pl.data.tars import find_tars
from flashar_pl.tokenizers import Tokenizer, build_tokenizer
from flashar_pl.tokenizers.text import MAX_PROMPT

BAD_SHARE, BAD_START = 0.01, 100
"""A reader gives up when more than this share of its samples is unreadable, once it has seen so many."""


@dataclass
class ImageBatch:
    """A batch before it is tokenised."""

    pixels: Tensor
    """(b, 3, h, w) uint8."""
    condition: Condition

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> ImageBatch:
        return ImageBatch(self.pixels.to(device), self.condition.to(device))


class ImageTarsDataModule(CodesDataModule):
    """Training batches from tars of jpg + cls or jpg + txt; validation and test from shards of codes.

    The shards say which tokenizer, grid and classes or captions the run has, so a small validation set made by
    `flashar tokenize` is all that is needed beside the tars.

    Against shards of codes this loses: the order of training samples depends on the number of devices and workers; a
    resumed run goes on with other tars instead of the next sample, so a sample may be seen twice or not at all in a
    pass; an epoch is a number of samples, not every sample once; a damaged tar is skipped from the damage on, with a
    warning at best; and the tokenizer runs in every step. Every device still makes the same number of batches.

    Args:
        tars: a folder of tars, a tar, a pattern such as "train-{0000..1023}.tar", or URLs that webdataset opens.
        shards: directory of the shards with the validation split and the manifest.
        epoch_samples: training samples of an epoch, over all devices.
        batch_size: global training batch of one forward pass, over all devices; must be a multiple of their number.
        num_workers: worker processes of each device that read and decode images; 0 reads in the training process.
        seed: of the order of tars, of shuffling and of the choice of crops.
        shuffle: samples of the buffer from which each reader draws.
        crop_range: class-conditional: the image's shorter side before a random one of ten crops is cut out, in crop
            sides; 1 takes the centre crop or its mirror image. Captioned images are fitted to the grid.
        tokenizer_weights: weights file of the tokenizer, if it is not where the manifest says.
        validation_batch_size: global batch of validation, test and prediction; empty = batch_size.
        limit_validation_samples: validate on at most this many samples, spread evenly over the split; empty = all.
        cache: where copies of remote shards are kept; empty = the user's cache directory.
        prompts: for captions and an Emu3.5 model, directory with emu3.tiktoken, released with the weights.
        max_prompt: longest prompt in tokens, template included; longer captions lose their end.
        text_encoder: in place of prompts, turns a caption into the 1-D int64 token ids of the whole prefix.
    """

    def __init__(
        self,
        tars: str,
        shards: str,
        epoch_samples: int,
        batch_size: int = 64,
        num_workers: int = 4,
        seed: int = 0,
        shuffle: int = 2000,
        crop_range: float = 1.1,
        tokenizer_weights: str | None = None,
        validation_batch_size: int | None = None,
        limit_validation_samples: int | None = None,
        cache: str | None = None,
        prompts: str | None = None,
        max_prompt: int = MAX_PROMPT,
        text_encoder: Callable | None = None,
    ) -> None:
        super().__init__(
            shards,
            batch_size,
            num_workers,
            seed,
            validation_batch_size=validation_batch_size,
            limit_validation_samples=limit_validation_samples,
            cache=cache,
            prompts=prompts,
            max_prompt=max_prompt,
            text_encoder=text_encoder,
        )
        if epoch_samples < batch_size:
            raise ValueError(f"epoch_samples={epoch_samples}; expected at least one batch of {batch_size}.")
        if shuffle < 1 or crop_range < 1:
            raise ValueError(f"shuffle={shuffle}, crop_range={crop_range}; expected 1 or more.")
        self.tars, self.epoch_samples, self.shuffle = tars, epoch_samples, shuffle
        self.crop_range, self.tokenizer_weights = crop_range, tokenizer_weights
        self._tokenizer: Tokenizer | None = None
        self._batches: ImageBatches | None = None
        self._handed_out = 0

    def setup(self, stage: str) -> None:
        """Check tars, tokenizer and devices before any long work. Raises ValueError."""
        super().setup("validate" if stage == "fit" else stage)
        if stage == "fit":
            check_cut(self.batch_size, self._rank()[1])
            if len(self.manifests) > 1:
                raise ValueError(f"shards is {self.location}, which holds several grids; expected the shards of one.")
            if self.manifest.condition.kind == "text-features":
                raise ValueError("Text features need an encoder and cannot be made on the fly; use shards with them.")
            self._urls = tar_urls(self.tars)
            self._tokenizer = self._build_tokenizer()

    def train_dataloader(self) -> ImageBatches:  # type: ignore[override]
        """This device's training batches, as pixels; `on_after_batch_transfer` tokenises them."""
        rank, ranks = self._rank()
        assert self._tokenizer is not None, "setup('fit') comes first"
        if self._batches is not None:
            self._handed_out = self._batches.handed_out
            self._batches.close()
        height, width = (side * self._tokenizer.downsample for side in self.manifest.grid)
        classes = self.manifest.condition.num_classes
        reader = ImageStream(
            self._urls,
            Prepare(height, width, self.crop_range, classes, self._encoder(self.manifest)),
            self.batch_size // ranks,
            stream(self.seed, 7, self._handed_out),
            self.shuffle,
            rank,
            ranks,
        )
        self._batches = ImageBatches(reader, self.num_workers, self.epoch_samples // self.batch_size, self._handed_out)
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out so far; they decide which tars a resumed run starts with."""
        return {"handed_out": self._handed_out if self._batches is None else self._batches.handed_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start elsewhere in the tars than the saved run did."""
        self._handed_out = state_dict["handed_out"]
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move an `ImageBatch` as a whole; anything else as for shards."""
        if isinstance(batch, ImageBatch):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tokenise an `ImageBatch` on the device it is on; other batches hold codes already."""
        if not isinstance(batch, ImageBatch):
            return batch
        assert self._tokenizer is not None
        codes = self._tokenizer.to(batch.pixels.device).encode(batch.pixels)  # (b, H, W)
        return Batch(codes, batch.condition)

    def teardown(self, stage: str) -> None:
        """Stop the workers."""
        if self._batches is not None:
            self._handed_out = self._batches.handed_out
            self._batches.close()

    def _build_tokenizer(self) -> Tokenizer:
        config = self.manifest.tokenizer
        if self.tokenizer_weights is not None:
            config = config | {"weights": self.tokenizer_weights}
        tokenizer = build_tokenizer(config)
        if tokenizer.vocabulary != self.manifest.vocabulary:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocabulary} codes, the shards at {self.location} have "
                f"{self.manifest.vocabulary}: set tokenizer_weights to the file that made them."
            )
        return tokenizer


@dataclass
class Prepare:
    """A webdataset sample -> pixels (3, h, w) uint8 and class id or prefix ids."""

    height: int
    width: int
    crop_range: float
    num_classes: int | None
    """None = captions."""
    text_encoder: TextEncoder | None

    def __call__(self, sample: dict[str, Any], rng: random.Random) -> tuple[np.ndarray, Any]:
        """Raises `Unreadable`."""
        data = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
        label = sample.get("txt" if self.num_classes is None else "cls")
        if data is None or label is None:
            raise Unreadable("no image or no condition in the record")
        image = open_rgb(data)
        text = label.decode("utf-8", "replace").strip()
        if self.num_classes is None:
            assert self.text_encoder is not None
            return fit(image, self.height, self.width), self.text_encoder(text)
        if not text.isdigit() or int(text) >= self.num_classes:
            raise ValueError(
                f"{sample['__url__']}: {sample['__key__']}.cls holds {text!r}; expected 0 .. {self.num_classes - 1}."
            )
        if self.height != self.width:
            return fit(image, self.height, self.width), int(text)
        side = int(self.height * self.crop_range)
        square = torch.from_numpy(centre_crop(image, side))[None]  # (1, 3, S, S)
        views = ten_crop(square, self.height)[0] if side > self.height else with_mirror(square)[0]
        return views[rng.randrange(len(views))].numpy(), int(text)


@dataclass
class ImageStream(IterableDataset):
    """Endless batches of one reader (a worker of a device).

    Pass after pass over the tars, each in another order that all readers know; every reader takes its share of each
    pass.
    """

    urls: list[str]
    prepare: Prepare
    batch_size: int
    key: int
    shuffle: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[ImageBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = self.rank * workers + worker, self.ranks * workers
        rng = random.Random(stream(self.key, reader))
        fruitless = [0]  # tars since the last sample
        samples = tarfile_samples(self._sources(reader, readers, fruitless), handler=webdataset.warn_and_continue)
        buffered = _shuffle(_watched(samples, fruitless), self.shuffle, self.shuffle // 4, rng)
        rows = self._rows(buffered, rng)
        while group := list(itertools.islice(rows, self.batch_size)):
            pixels = torch.from_numpy(np.stack([pixels for pixels, _ in group]))  # (b, 3, h, w)
            values = [value for _, value in group]
            prompts = self.prepare.num_classes is None
            yield ImageBatch(pixels, Prompts(values) if prompts else ClassIds(torch.tensor(values)))

    def _sources(self, reader: int, readers: int, fruitless: list[int]) -> Iterator[dict[str, str]]:
        for turn in itertools.count():
            for place, tar in enumerate(permutation(stream(self.key, 8, turn), len(self.urls)).tolist()):
                if (place + turn) % readers != reader:
                    continue
                fruitless[0] += 1
                if fruitless[0] > 2 * len(self.urls):
                    raise ValueError(f"None of the tars gives a sample, such as {self.urls[tar]}; see the warnings.")
                yield {"url": self.urls[tar]}

    def _rows(self, samples: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[tuple[np.ndarray, Any]]:
        bad = 0
        for seen, sample in enumerate(samples, start=1):
            try:
                yield self.prepare(sample, rng)
            except Unreadable as error:
                bad += 1
                where = f"{sample.get('__url__')}: {sample.get('__key__')}: {error}"
                warnings.warn(f"skipped {where}", stacklevel=1)
                if seen >= BAD_START and bad > BAD_SHARE * seen:
                    raise ValueError(f"{bad} of {seen} samples cannot be read; the last one: {where}") from error


def _watched(samples: Iterable[dict[str, Any]], fruitless: list[int]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        fruitless[0] = 0
        yield sample


class ImageBatches:
    """Epochs of a fixed number of batches from an endless stream; the workers live from epoch to epoch.

    It is no torch `DataLoader`, so a Trainer does not replace its sampler: the tars are cut over ranks already.
    """

    def __init__(self, reader: ImageStream, num_workers: int, batches: int, handed_out: int) -> None:
        self._loader = DataLoader(reader, batch_size=None, num_workers=num_workers, generator=torch.Generator())
        self._iterator: Any = None
        self._n = batches
        self.handed_out = handed_out

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[ImageBatch]:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        for _ in range(self._n):
            batch = next(self._iterator)
            self.handed_out += 1
            yield batch

    def close(self) -> None:
        """Stop the workers."""
        if hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = None


def tar_urls(location: str) -> list[str]:
    """Tars as webdataset opens them: URLs and `pipe:` commands with {000..127} written out, or local files.

    Raises ValueError if there are none.
    """
    if location.startswith("pipe:") or "://" in location:
        import braceexpand

        return list(braceexpand.braceexpand(location))
    return [str(path) for path in find_tars(location)]
