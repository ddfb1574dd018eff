"""The Lightning DataModules: wiring only. Two ways of reading, one line of YAML apart:

    reading: exact      our order (order.py): the same samples on any number of devices and workers, resumable exactly
    reading: streamed   webdataset's own pipeline (streaming.py): any tars that it can open, equal batches per device

`CodesDataModule` reads shards of codes; `ImageNetDataModule` (classes) and `TextImageDataModule` (captions) read images
that are tokenised while training, and validate on shards of codes.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from flashar_pl.backbones.condition import Batch, Conditioning
from flashar_pl.data.batches import Cut, TrainingBatches, evaluation_batches, training_batches
from flashar_pl.data.captions import captioned_images
from flashar_pl.data.encode import shrunk, tokenizer_of, with_weights
from flashar_pl.data.first_use import share_marks
from flashar_pl.data.loader import EvaluationLoader, TrainingLoader
from flashar_pl.data.locations import is_remote
from flashar_pl.data.manifest import Manifest, check_matches, load_grids
from flashar_pl.data.mixture import MixedSource, described, load_mixture, mixed_batches
from flashar_pl.data.order import TrainingOrder, check_cut
from flashar_pl.data.pixels import ImageBatch, ImageBatches, ImageRows, Prepare
from flashar_pl.data.prompt_encoder import PromptEncoder
from flashar_pl.data.sources import Source, class_images, read_classes
from flashar_pl.data.streaming import Arrivals, Stream, StreamedLoader, code_rows, collate_codes, shard_urls, tar_urls
from flashar_pl.data.tally import Tally
from flashar_pl.data.verify import check_held_out
from flashar_pl.tokenizers import Tokenizer
from flashar_pl.tokenizers.prompts import MAX_PROMPT

Reading = Literal["exact", "streamed"]
MOST_RANGE = 10
"""Sides of a crop that the shorter side of an image is enlarged to, at most."""
BLOCK = 100
"""Images that are read near to one another, where they are no shards of ours."""


class CodesDataModule(LightningDataModule):
    """Batches of codes from shards made by `flashar tokenize`.

    Read exactly, the order of training samples follows from the seed, the epoch and the shards alone: runs on any
    number of devices and workers see the same global batches, and a checkpoint continues exactly where it was saved, in
    the middle of an epoch too, on another number of devices or workers. The data is cut over devices here, whatever the
    Trainer's `use_distributed_sampler` says.

    Args:
        shards: where the shards and their manifest.json are: a directory, a URL, or `pipe:COMMAND` with {path} in it;
            or a directory of such directories, one for each grid, as `flashar tokenize text-image` writes them; or
            several of these with weights, {data/a: 0.7, data/b: 0.3}: a mixture, drawn from in these proportions.
        reading: exact, or streamed by webdataset's pipeline: not resumable at the sample, but nothing is copied first.
        batch_size: global training batch of one forward pass, over all devices; must be a multiple of their number.
            With gradient accumulation an optimiser step sees this many samples several times over.
        num_workers: worker processes of each device that read ahead; 0 reads in the training process.
        seed: seed of the order of training samples and of the choice of crops.
        window: exact: blocks of the shards whose samples are shuffled together.
        shuffle: streamed: samples of the buffer from which each reader draws.
        resampled: streamed: every reader draws tars with replacement; false deals them out, pass after pass.
        epoch_samples: streamed: training samples of an epoch, over all devices; empty = those of the shards.
        validation_batch_size: global batch of validation, test and prediction; empty = batch_size.
        limit_validation_samples: validate on at most this many samples, spread evenly over the split; empty = all.
        cache: directory for copies of shards that are not local; empty = the user's cache directory.
        verify: compare every shard with its hash in the manifest, once a run, before its first sample is used.
        prompts: for captions and an Emu3.5 model, directory with emu3.tiktoken, released with the weights.
        max_prompt: longest prompt in tokens, template included; longer captions lose their end.
        text_encoder: in place of prompts, turns a caption into the 1-D int64 token ids of the whole prefix.
        tokenizer_weights: weights file or directory of the tokenizer, if it is not where the manifest says, or another
            user's manifest says it.
    """

    def __init__(
        self,
        shards: str | dict[str, float],
        reading: Reading = "exact",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        window: int = 256,
        shuffle: int = 2000,
        resampled: bool = True,
        epoch_samples: int | None = None,
        validation_batch_size: int | None = None,
        limit_validation_samples: int | None = None,
        cache: str | None = None,
        verify: bool = True,
        prompts: str | None = None,
        max_prompt: int = MAX_PROMPT,
        text_encoder: Callable | None = None,
        tokenizer_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["text_encoder"], logger=False)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; expected 0 or more.")
        if shuffle < 1:
            raise ValueError(f"shuffle={shuffle}; expected 1 or more.")
        if reading == "streamed" and epoch_samples is not None and epoch_samples < batch_size:
            raise ValueError(f"epoch_samples={epoch_samples}; expected at least one batch of {batch_size}.")
        if prompts is not None and text_encoder is not None:
            raise ValueError("prompts and text_encoder are both given; expected one of them.")
        self.location, self.reading = shards, reading
        self.batch_size, self.num_workers, self.seed, self.window = batch_size, num_workers, seed, window
        self.shuffle, self.resampled, self.epoch_samples = shuffle, resampled, epoch_samples
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.limit_validation_samples = limit_validation_samples
        self.verify, self.tokenizer_weights = verify, tokenizer_weights
        self.cache, self.prompts, self.max_prompt, self.text_encoder = cache, prompts, max_prompt, text_encoder
        self._manifests: list[Manifest] = []
        self._mixture: list[MixedSource] = []
        if isinstance(shards, dict) and reading == "streamed":
            raise ValueError("shards is a mixture, which is read exactly; leave out reading: streamed.")
        self._source: TrainingBatches | ImageBatches | Stream | None = None
        self._training: TrainingLoader | StreamedLoader | None = None
        self._restored: dict[str, Any] = {}

    @property
    def manifests(self) -> list[Manifest]:
        """One manifest for each grid of each source, that with most training samples first, read when first asked for.
        Raises ValueError as `load_grids` and `load_mixture` do."""
        if self._manifests:
            return self._manifests
        if isinstance(self.location, dict):
            self._mixture = load_mixture(self.location)
            found = [manifest for source in self._mixture for manifest in source.manifests]
            self._manifests = sorted(found, key=lambda manifest: -manifest.samples("train"))
        else:
            self._manifests = load_grids(str(self.location))
        if self.tokenizer_weights is not None:
            self._manifests = [with_weights(each, self.tokenizer_weights) for each in self._manifests]
        return self._manifests

    @property
    def manifest(self) -> Manifest:
        """The manifest of the shards; of several grids, that of the one with most training samples."""
        return self.manifests[0]

    def check_model(self, vocabulary: int, takes: Conditioning) -> None:
        """Raises ValueError unless a model can train on these shards, and the assets in `prompts` are its own."""
        check_matches(self.manifest, vocabulary, takes)
        encoder = self._encoder(self.manifest)
        if isinstance(encoder, PromptEncoder):
            encoder.text.check_vocabulary(takes.size, takes.first_visual)

    def _encoder(self, manifest: Manifest) -> Callable | None:
        """What turns captions of images of the manifest's grid into token ids; None for shards without captions."""
        if manifest.condition.kind != "text":
            return None
        if self.text_encoder is None and self.prompts is not None:
            self.text_encoder = PromptEncoder(self.prompts, manifest.grid, self.max_prompt)
        if self.text_encoder is None:
            raise ValueError(
                f"The shards of {manifest.name!r} hold captions: give text_encoder, or prompts: the "
                "directory with their tokenizer, such as the model's own, to turn them into ids."
            )
        if isinstance(self.text_encoder, PromptEncoder):
            return self.text_encoder.for_grid(manifest.grid)
        return self.text_encoder

    def setup(self, stage: str) -> None:
        """Check the settings against the data and the devices before any long work. Raises ValueError."""
        cut = self._cut()
        if stage == "fit":
            check_cut(self.batch_size, cut.ranks)
        check_cut(self.validation_batch_size, cut.ranks, "validation_batch_size")
        self._encoder(self.manifest)
        if cut.ranks > 1 and self.verify:
            share_marks()
        if stage == "fit":
            self._training, self._restored = None, {}
            for manifest in self.manifests:
                if {"train", "validation"} <= manifest.splits.keys() and not is_remote(manifest.root):
                    check_held_out(manifest)
            self._source = self._streamed(cut) if self.reading == "streamed" else self._exact(cut)
            if isinstance(self._source, Stream):
                self._source.check(self.num_workers)

    def _exact(self, cut: Cut) -> TrainingBatches | ImageBatches:
        """Training batches in our order."""
        manifests, how = self.manifests, (self.batch_size, self.seed, self.window, cut, self._reshuffle())
        if not self._mixture:
            return training_batches(manifests, *how)
        batches = mixed_batches(self._mixture, *how)
        rank_zero_info(described(self._mixture, batches))
        return batches

    def drawn(self) -> dict[str, int]:
        """Of a mixture, samples of each source that training has been given since its start, over all devices."""
        if not self._mixture or not isinstance(self._training, TrainingLoader):
            return {}
        place = self._training.state_dict()
        assert isinstance(self._source, TrainingBatches)
        counts = self._source.drawn(place["epoch"], place["position"]).tolist()
        return {source.name: n for source, n in zip(self._mixture, counts, strict=True)}

    def _streamed(self, cut: Cut) -> Stream:
        """Training batches of webdataset's pipeline."""
        manifest = self._one_grid()
        collate = partial(collate_codes, manifest, self._encoder(manifest))
        arrivals, rows = Arrivals(manifest) if self.verify else None, partial(code_rows, manifest)
        tally = Tally(max(1, self.num_workers))
        if (n := manifest.samples("train")) < self.batch_size and self.epoch_samples is None:
            raise ValueError(
                f"The training split has {n} samples, fewer than one batch of {self.batch_size}; set batch_size to at "
                f"most {n}, or epoch_samples."
            )
        return self._stream(cut, shard_urls(manifest), rows, collate, arrivals=arrivals, shuffle_rows=True, tally=tally)

    def _stream(self, cut: Cut, urls: list[str], rows: Callable, collate: Callable, **more: Any) -> Stream:
        mixing = (self.batch_size, self.seed, self.shuffle, self.resampled)
        return Stream(urls, rows, collate, *mixing, rank=cut.rank, ranks=cut.ranks, **more)

    def _one_grid(self) -> Manifest:
        if len(self.manifests) > 1:
            raise ValueError(f"shards is {self.location}, which holds several grids; expected the shards of one.")
        return self.manifest

    def train_dataloader(self) -> TrainingLoader | StreamedLoader:
        """This device's training batches; the loader holds the place in the data."""
        place = self.state_dict()
        if self._source is None:
            self.setup("fit")
        assert self._source is not None
        if isinstance(self._source, Stream):
            samples = self.epoch_samples or self.manifest.samples("train")
            n = samples // self.batch_size
            say = rank_zero_info if self._source.rank == 0 else partial(print, file=sys.stderr, flush=True)
            self._training = StreamedLoader(self._source, self.num_workers, n, self._reshuffle(), say)
        else:
            processed = None
            if self.trainer is not None:
                progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
                processed = lambda: progress.current.processed  # noqa: E731
            self._training = TrainingLoader(self._source, self.num_workers, processed)
        if place:
            self._training.load_state_dict(place)
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data. The Trainer saves it from the loader too, but after an epoch's last batch
        it does not restore that one."""
        return self._restored if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start training at a saved place, at the next `train_dataloader`."""
        self._training, self._restored = None, state_dict

    def val_dataloader(self) -> EvaluationLoader:
        """This device's validation batches, each sample once over all devices."""
        return self._evaluation("validation", self.limit_validation_samples)

    def test_dataloader(self) -> EvaluationLoader:
        """This device's test batches, each sample once over all devices."""
        return self._evaluation("test")

    predict_dataloader = test_dataloader

    def _evaluation(self, split: str, limit: int | None = None) -> EvaluationLoader:
        batches = evaluation_batches(self.manifests, split, self.validation_batch_size, limit, self._cut())
        return EvaluationLoader(batches, self.num_workers)

    def _reshuffle(self) -> bool:
        return self.trainer is None or self.trainer.overfit_batches == 0  # type: ignore[attr-defined]

    def _cut(self) -> Cut:
        """This device's place among those that see different data: tensor-parallel devices share theirs."""
        place = {} if self.trainer is None else self.trainer.distributed_sampler_kwargs or {}
        return Cut(place.get("rank", 0), place.get("num_replicas", 1), self._encoder, self.cache, self.verify)


class _ImagesDataModule(CodesDataModule):
    """Training images, tokenised on the training device; validation and test from shards of codes.

    The shards say which tokenizer, grid and classes or captions the run has, so a small validation set made by
    `flashar tokenize` is all that is needed beside the images.

    Args:
        images: tars of jpg + txt: a folder of them, a tar, or a pattern; or a .json or .jsonl list of captions and
            image paths. Streamed: tars only, also as URLs and `pipe:` commands.
        shards: directory of the shards with the validation split and the manifest: they say which tokenizer, grid and
            condition the run has.
        num_workers: worker processes of each device that read and decode images; 0 reads in the training process.
    """

    kind: str
    """Condition of the shards that go with such images."""
    crop_range = 1.0
    classes: str | None = None

    def __init__(self, images: str, shards: str, num_workers: int = 4, **options: Any) -> None:
        super().__init__(shards, num_workers=num_workers, **options)
        self.images = images
        if self.reading == "streamed" and self.epoch_samples is None:
            raise ValueError("epoch_samples is missing: how many images of the tars make an epoch.")
        self._tokenizer: Tokenizer | None = None

    def setup(self, stage: str) -> None:
        """Check images, tokenizer and devices before any long work. Raises ValueError."""
        if stage == "fit":
            manifest = self._one_grid()
            if manifest.condition.kind != self.kind:
                raise ValueError(
                    f"The shards at {self.location} have the condition {manifest.condition.kind!r}; "
                    f"{type(self).__name__} expects {self.kind!r}."
                )
            self._tokenizer = tokenizer_of(manifest, None, "--data.tokenizer_weights")
        super().setup(stage)

    @abstractmethod
    def _read_source(self) -> Source:
        """The images, for reading by number."""

    def _exact(self, cut: Cut) -> ImageBatches:
        source = self._read_source()
        self._check_classes(self.images, source.condition.num_classes)
        if source.account.left_out:
            rank_zero_info(f"{self.images}: {source.account}")
        blocks = np.diff([*range(0, len(source), BLOCK), len(source)])  # (M,)
        order = TrainingOrder(blocks, self.batch_size, self.seed, self.window)
        return ImageBatches(source, self._prepare(), order, cut.rank, cut.ranks, self._reshuffle())

    def _streamed(self, cut: Cut) -> Stream:
        prepare, tally = self._prepare(), Tally(max(1, self.num_workers))
        names = read_classes(self.classes, self.manifest.class_names)
        ids = None if names is None else {name: i for i, name in enumerate(names)}
        if names is not None:
            self._check_classes(str(self.classes), len(names))
        return self._stream(cut, tar_urls(self.images), ImageRows(prepare, ids, tally), prepare.collate, tally=tally)

    def _check_classes(self, what: str, n: int | None) -> None:
        if n != (known := self.manifest.condition.num_classes):
            raise ValueError(f"{what} has {n} classes, the shards at {self.location} have {known}.")

    def _prepare(self) -> Prepare:
        assert self._tokenizer is not None
        height, width = (side * self._tokenizer.downsample for side in self.manifest.grid)
        classes = self.manifest.condition.num_classes
        return Prepare(height, width, self.crop_range, classes, self._encoder(self.manifest))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tokenise an `ImageBatch` on the device it is on; other batches hold codes already."""
        if not isinstance(batch, ImageBatch):
            return batch
        assert self._tokenizer is not None
        tokenizer, smaller = self._tokenizer.to(batch.pixels.device), self.manifest.preview
        codes = tokenizer.encode(batch.pixels)  # (b, H, W)
        previews = None if smaller is None else tokenizer.encode(shrunk(batch.pixels, smaller, tokenizer))  # (b, h, w)
        return Batch(codes, batch.condition, index=batch.index, previews=previews)


class ImageNetDataModule(_ImagesDataModule):
    """Images with classes, tokenised while training; validation and test from shards of codes.

    Args:
        images: an image folder (one sub-folder a class) or tars of jpg + cls: a folder of them, a tar, or a pattern
            such as "train-{0000..1023}.tar". Streamed: tars only, also as URLs and `pipe:` commands.
        crop_range: the image's shorter side before a random one of ten crops is cut out, in crop sides; 1 takes the
            centre crop or its mirror image.
        classes: file of class names, one a line, in the order of their ids, where folders or tars hold names.
    """

    kind = "class"

    def __init__(
        self, images: str, shards: str, crop_range: float = 1.1, classes: str | None = None, **options: Any
    ) -> None:
        super().__init__(images, shards, prompts=None, max_prompt=MAX_PROMPT, text_encoder=None, **options)
        if not 1 <= crop_range <= MOST_RANGE:
            raise ValueError(f"crop_range={crop_range}; expected 1 to {MOST_RANGE}.")
        self.crop_range, self.classes = crop_range, classes

    def _read_source(self) -> Source:
        known = self.manifest
        return class_images(self.images, self.classes, None, known.condition.num_classes, known.class_names)


class TextImageDataModule(_ImagesDataModule):
    """Images with captions, tokenised while training; validation and test from shards of codes.

    Every image is fitted to the grid of the shards.
    """

    kind = "text"

    def _read_source(self) -> Source:
        return captioned_images(self.images)
