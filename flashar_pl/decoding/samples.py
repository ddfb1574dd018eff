"""A numbered set of samples, drawn batch by batch: what in-training validation and the commands share.

Sample i is drawn from seed + i under condition i, in a batch of one fixed shape whose number is i // batch size. So a
sample depends neither on the number of ranks, nor on which rank draws it, nor on whether a run was interrupted.

Shapes: n samples in all, B samples of a batch, b of them wanted, H, W grid, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import starmap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.backbones.condition import Condition, as_condition
from flashar_pl.decoding.engine import Engine
from flashar_pl.decoding.loop import Progress
from flashar_pl.metrics.extractor import FeatureExtractor, Features, check_features, unchecked_features
from flashar_pl.models.base import GridModel
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import Tokenizer
from flashar_pl.tokenizers.conv_tokenizer import ConvTokenizer

PREVIEW_SEED = 2**40
"""Added to the seeds of samples whose preview is drawn first, so that both have their own random numbers."""
PIXELS = 2**20
"""Decoded to images together: four of 512 x 512, whose activations in Emu3.5's decoder take about 4 GB."""


@dataclass(frozen=True)
class SampleSet:
    """Which samples to draw, and how."""

    condition: Condition
    """Of m entries; the constructor takes bare class ids or a bare list of prompts, too."""
    grid: tuple[int, int]
    """(H, W)."""
    plan: str
    """Name of the decoding plan."""
    sampling: SamplingSettings
    batch_size: int
    """Samples drawn together, B; a last partial batch is filled up with the last sample and the surplus dropped."""
    seed: int = 0
    """Sample i uses seed + i."""
    unconditional: Condition | None = None
    """What guidance leads away from, of m entries; None = the model's own null condition."""
    every: int = 1
    """Sample i has entry (i // every) % m."""
    n: int = 0
    """Samples 0 .. n - 1; 0 = m * every."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition", as_condition(self.condition))
        object.__setattr__(self, "n", self.n or len(self.condition) * self.every)

    def entries(self, of: Condition, batch: int) -> Condition:
        """The conditions of a batch, from those of all entries."""
        return of.rows([min(i, self.n - 1) // self.every % len(of) for i in self.numbers(batch)])

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.n // self.batch_size)

    def batches_of_rank(self, rank: int, ranks: int) -> list[int]:
        """Batches k with k % ranks == rank, equally many on every rank: ranks that share one model act together.

        Some may lie behind the last; they are drawn and dropped.
        """
        return [turn * ranks + rank for turn in range(-(-self.batches // ranks))]

    def numbers(self, batch: int) -> list[int]:
        """Sample numbers of a batch, always B of them."""
        return list(range(batch * self.batch_size, (batch + 1) * self.batch_size))

    def wanted(self, batch: int) -> list[int]:
        """Those of `numbers` that are samples; the others fill the batch up."""
        return [i for i in self.numbers(batch) if i < self.n]


@dataclass(frozen=True)
class Drawn:
    """The wanted samples of one batch."""

    batch: int
    index: Tensor
    """(b,) int64 sample numbers, ascending."""
    codes: Tensor
    """(b, H, W) int64."""
    images: Tensor
    """(b, 3, h, w) uint8."""
    features: Features | None
    """Of the images; None without an extractor."""


def draw_batch(
    engine: Engine, samples: SampleSet, batch: int, on_step: Callable[[Progress], object] | None = None
) -> Tensor:
    """Codes (B, H, W) int64 of one batch, those that only fill it up included. on_step: see `Engine.generate`."""
    return draw_both(engine, samples, batch, on_step)[0]


def draw_both(
    engine: Engine, samples: SampleSet, batch: int, on_step: Callable[[Progress], object] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same, and the codes (B, h, w) of the previews that were drawn before; None where there are none to draw."""
    backbone, options = engine.model.backbone, {"plan": samples.plan, **asdict(samples.sampling)}
    condition, previews = samples.entries(samples.condition, batch), None
    nulls = None if samples.unconditional is None else samples.entries(samples.unconditional, batch)
    seeds = [samples.seed + i for i in samples.numbers(batch)]
    # of all samples' conditions: ranks that share one model have other batches, and forward in step
    if (smaller := backbone.preview_grid(samples.condition, samples.grid)) is not None:
        own, counted = [seed + PREVIEW_SEED for seed in seeds], len(engine.forwards)
        previews = engine.generate(condition, smaller, seeds=own, unconditional=nulls, **options)
        del engine.forwards[counted:]  # those of the preview, which is no sample
        condition = backbone.with_preview(condition, previews)
        nulls = None if nulls is None else backbone.with_preview(nulls, previews)
    codes = engine.generate(condition, samples.grid, seeds=seeds, unconditional=nulls, on_step=on_step, **options)
    return codes, previews


def draw_codes(
    engine: Engine,
    samples: SampleSet,
    advance: Callable[[int], Any] | None = None,
    on_step: Callable[[Progress], object] | None = None,
) -> Tensor:
    """Codes (n, H, W) int64 of all samples, on the CPU.

    advance: called with the number of finished samples after every batch. on_step: called after every decoding step.
    """
    parts = []
    for batch in range(samples.batches):
        codes = draw_batch(engine, samples, batch, on_step)  # (B, H, W)
        parts.append(codes[: len(samples.wanted(batch))].cpu())
        if advance is not None:
            advance(len(parts[-1]))
    return torch.cat(parts)


def draw(
    engine: Engine | GridModel,
    tokenizer: Tokenizer,
    samples: SampleSet,
    batches: Iterable[int] | None = None,
    extractor: FeatureExtractor | None = None,
    side: int | None = None,
) -> Iterator[Drawn]:
    """Generate, decode, resize and extract features of the given batches (None = all), one after the other.

    Tokenizer and extractor must be on the model's device. Padding goes through every stage and is cut off at the end,
    so that every batch has the same shape everywhere. Batches without wanted samples are generated, not yielded.
    On a GPU a batch is decoded to pixels beside the drawing of the next one, and yielded after that has begun.

    Args:
        engine: a bare model is decoded by the eager runner.
        side: see `decode_images`.
    """
    engine = engine if isinstance(engine, Engine) else Engine(engine, "eager")

    def finish(batch: int, codes: Tensor) -> Drawn:
        images, keep = decode_images(tokenizer, codes, side), len(samples.wanted(batch))  # (B, 3, h, w)
        features = None if extractor is None else unchecked_features(extractor, images).first(keep)
        return Drawn(batch, torch.tensor(samples.wanted(batch)), codes[:keep], images[:keep], features)

    chosen = range(samples.batches) if batches is None else batches
    drawn = ((batch, draw_batch(engine, samples, batch)) for batch in chosen)
    wanted = ((batch, codes) for batch, codes in drawn if samples.wanted(batch))
    made = _beside(engine.device, wanted, finish) if engine.device.type == "cuda" else starmap(finish, wanted)
    for each in made:
        if extractor is not None and each.features is not None:
            check_features(extractor, each.features)  # waits for the device: after the next batch has begun
        yield each


def _beside(
    device: torch.device, drawn: Iterator[tuple[int, Tensor]], finish: Callable[[int, Tensor], Drawn]
) -> Iterator[Drawn]:
    """What `finish` makes of each batch and its codes, on a stream of its own: the device works on it while the next
    codes are drawn. The stream of the caller waits for a batch that it is given, not for the one after."""
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    last: tuple[Drawn, torch.cuda.Event] | None = None

    def ready(made: Drawn, done: torch.cuda.Event) -> Drawn:
        here.wait_event(done)
        found = made.features or Features(made.images)
        for tensor in (made.images, found.pool, found.spatial, found.logits):
            if tensor is not None:
                tensor.record_stream(here)  # else its memory could be used again while it is read here
        return made

    for batch, codes in drawn:
        side.wait_stream(here)
        codes.record_stream(side)
        with torch.cuda.stream(side):
            made = finish(batch, codes)
            done = side.record_event()
        if last is not None:
            yield ready(*last)
        last = made, done
    if last is not None:
        yield ready(*last)


@torch.no_grad()
def decode_images(tokenizer: Tokenizer, codes: Tensor, side: int | None = None) -> Tensor:
    """Codes (B, H, W) to uint8 images (B, 3, h, w), resized to side x side pixels if `side` is given.

    Resizing is LlamaGen's: bicubic without antialiasing, on the decoder's floating-point output, before the
    tokenizer's own rule to uint8 (clamp(127.5 x + 128, 0, 255), truncated, for its VQ).

    Raises:
        ValueError: see `check_resize`.
    """
    if side is None or tokenizer.image_size((codes.shape[1], codes.shape[2])) == (side, side):
        return tokenizer.decode(codes)
    convolutional = check_resize(tokenizer, (codes.shape[1], codes.shape[2]), side)
    resized = F.interpolate(tokenizer.decode_float(codes), size=(side, side), mode="bicubic")
    return convolutional.to_uint8(resized)


def decode_all(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes (n, H, W) to uint8 images (n, 3, h, w) on the CPU, a few at a time on the tokenizer's device; grey where a
    code is -1: not drawn yet (see `Progress`)."""
    device = next((t.device for t in (*tokenizer.parameters(), *tokenizer.buffers())), torch.device("cpu"))
    height, width = tokenizer.image_size((codes.shape[1], codes.shape[2]))
    parts = codes.split(max(1, PIXELS // (height * width)))
    return torch.cat([tokenizer.decode_partial(part.to(device)).cpu() for part in parts])


def check_resize(tokenizer: Tokenizer, grid: tuple[int, int], side: int) -> ConvTokenizer:
    """The tokenizer, if the images it decodes from a grid (H, W) can be resized to side x side; else ValueError."""
    height, width = tokenizer.image_size(grid)
    if height != width or not isinstance(tokenizer, ConvTokenizer):
        raise ValueError(
            f"images of {height} x {width} pixels from {type(tokenizer).__name__} cannot be resized to {side} x {side};"
            " expected square images of a convolutional tokenizer."
        )
    return tokenizer
