"""Images from a checkpoint in two lines of Python, shaped like a pipeline of diffusers.

    pipeline = FlashARPipeline.from_pretrained("runs/demo/flashar/checkpoints/last.ckpt").to("cuda")
    pipeline(classes=[3, 7], num_images=4, seed=1).images[0].save("three.png")

Options have the names, defaults and meanings of `flashar generate` (`flashar_pl.options`), and equal seeds
give the codes that it writes.

Shapes: N samples in all, H x W grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from flashar_pl.checkpoints.opening import Source, open_checkpoint
from flashar_pl.checkpoints.repositories import located
from flashar_pl.console import closest, progress_bar
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.engine import Engine
from flashar_pl.decoding.request import DrawRequest
from flashar_pl.decoding.samples import SampleSet, decode_all, draw_codes
from flashar_pl.devices import find_device
from flashar_pl.layers.rounded import ROUNDED
from flashar_pl.options import (
    EngineOptions,
    ModelOptions,
    Plan,
    SampleOptions,
    SamplingSettings,
    ShapeOptions,
    TextOptions,
    parse_classes,
)
from flashar_pl.pictures import picture, tile
from flashar_pl.planner.room import fitting_batch
from flashar_pl.ranks import Rank
from flashar_pl.tokenizers import Tokenizer


@dataclass(frozen=True)
class PipelineOutput:
    """N samples, those of one class or prompt side by side."""

    images: list[Image]
    """Of the decoder's own size; empty with codes_only."""
    codes: Tensor
    """(N, H, W) int64, on the CPU."""
    labels: list[str]
    seeds: list[int]
    prompts: list[str] | None
    """None where samples have none."""
    plan: str
    steps: int
    """Decoding steps of one image."""
    seconds: float
    """For all codes, without the decoder. The first call also warms up."""
    settings: dict[str, Any]
    """What drew them, as in settings.json of `flashar generate`."""

    def sheet(self, columns: int | None = None) -> Image:
        """All images as one. Raises ValueError without images."""
        if not self.images:
            raise ValueError("these samples are codes without images; leave out codes_only.")
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in self.images])).permute(0, 3, 1, 2)
        return picture(tile(pixels, columns))


class FlashARPipeline:
    """A checkpoint with its grid and tokenizer, and what decodes it; made by `from_pretrained`."""

    def __init__(self, model: ModelOptions, engine: EngineOptions = EngineOptions(), text: TextOptions = TextOptions()):
        self._model, self._options, self._text = model, engine, text
        self._source = open_checkpoint(model, engine)
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Self:
        """A checkpoint of any kind: a path, or owner/name of a Hugging Face repository that holds a model directory,
        or owner/name/FILE: from its local cache, and with download=True fetched into it.

        Args:
            options: of `ModelOptions`, `EngineOptions` and `TextOptions`, such as device="cuda", dtype="bf16",
                grid="16x16", tokenizer="vq16:vq_ds16_c2i.pt", branch_layer=11, assets=DIRECTORY.

        Raises:
            ValueError: nothing there, an unknown option, or a file that is no checkpoint.
        """
        kinds = {ModelOptions: {"checkpoint": str(path_or_repo)}, EngineOptions: {}, TextOptions: {}}
        model, engine, text = _groups("from_pretrained", options, kinds)
        return cls(located(model), engine, text)

    @property
    def source(self) -> Source:
        """Model, grid, tokenizer and everything else that the checkpoint says."""
        return self._source

    @property
    def grid(self) -> tuple[int, int] | None:
        """(H, W); None = the checkpoint does not say it."""
        return self._source.grid

    @property
    def device(self) -> str:
        return str(self._source.device)

    def to(self, device: str) -> Self:
        """The same pipeline on another device (auto, cpu, cuda, cuda:N or mps). ValueError where there is none."""
        place = find_device(str(device))
        self._options = replace(self._options, device=str(place))
        if self._engine is None:
            if self._options.weight_format not in ROUNDED:  # those go there when they are rounded, see `Source.device`
                self._source.model.to(place)
            self._source.device = place
        else:  # its weights may be laid out for the device it was on
            self._engine = None
            self._source = open_checkpoint(self._model, self._options)
        self._tokenizer = None
        return self

    def __call__(
        self,
        classes: int | str | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images: int = SampleOptions.num_images,
        seed: int = SampleOptions.seed,
        plan: Plan | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        batch_size: int | None = None,
        text_features: str | None = None,
        codes_only: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> PipelineOutput:
        """Draw num_images samples of each class or prompt; sample i from seed + i.

        Args:
            classes: ids, "3,7", "0-9", or names that the training data had.
            prompt: one text, or several.
            plan: raster or diagonal; None = the checkpoint's own.
            cfg_scale: guidance; None = the model's own.
            batch_size: images computed together; None = 16, or fewer where fewer fit.
            text_features: a file, see `Subject`.
            codes_only: no images; needs no tokenizer.
            progress: show a progress bar.
            options: others of `SamplingSettings` (temperature, top_k, top_p, greedy, coupling, cfg_interval) and
                `ShapeOptions` (aspect_ratio, image_size).

        Raises:
            ValueError: an unknown option, or one that does not fit the model.
        """
        kinds = {SamplingSettings: {"cfg_scale": cfg_scale}, ShapeOptions: {}}
        sampling, shape = _groups("the pipeline", options, kinds)
        texts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        ids = classes if isinstance(classes, str | None) else parse_classes(classes)
        subject = SampleOptions(texts, None, ids, text_features, num_images, seed)
        text = replace(self._text, negative_prompt=negative_prompt or self._text.negative_prompt)
        usual, source = self._options, self._source
        engine = replace(usual, batch_size=batch_size or usual.batch_size, plan=plan or usual.plan)
        asked = DrawRequest.of(source, subject, sampling, shape, text, engine.plan)
        wanted, grid, name = asked.wanted, asked.grid, asked.plan
        if not codes_only and self._tokenizer is None:
            self._tokenizer = source.matching_tokenizer(engine.device, engine.pixel_dtype)
        if self._engine is None:
            self._engine = build_engine(source, engine, name)
        what = "steps" if progress else None
        samples, codes, seconds = draw_asked(source, self._engine, asked, engine.batch_size, what)
        decoder = None if codes_only else self._tokenizer
        pixels = torch.empty(0) if decoder is None else decode_all(decoder, codes)  # (N, 3, h, w)
        settings = asdict(subject) | asdict(asked.sampling) | asdict(engine) | {
            "plan": name, "batch_size": samples.batch_size, "grid": list(grid), "runner": self._engine.runner,
        }  # fmt: skip
        seeds = [subject.seed + i for i in range(len(wanted))]
        images = [picture(image) for image in pixels]
        steps = source.model.make_plan(name, *grid).n_steps
        return PipelineOutput(images, codes, wanted.labels, seeds, wanted.prompts, name, steps, seconds, settings)


def draw_asked(
    source: Source,
    engine: Engine,
    asked: DrawRequest,
    batch_size: int | Literal["auto"] | None,
    what: str | None,
    rank: Rank = Rank(),
) -> tuple[SampleSet, Tensor, float]:
    """The samples of a request, their codes (N, H, W) int64 on the CPU, and the seconds that they took.

    what: of the progress bar, such as "steps"; None = there is none. rank: of those that share the model, which
    all draw all samples. ValueError for a batch size that does not fit.
    """
    fitting = fitting_batch(source, asked, batch_size, engine.prefix_bucket, rank.world)
    samples = asked.samples(min(rank.gather(fitting)))  # devices may have unlike room
    steps = samples.batches * source.model.make_plan(asked.plan, *asked.grid).n_steps
    with nullcontext(lambda _: None) if what is None or rank.rank else progress_bar(steps, what) as advance:
        began = time.perf_counter()
        codes = draw_codes(engine, samples, on_step=lambda _: advance(1))
        return samples, codes, time.perf_counter() - began


def _groups(what: str, options: dict[str, Any], kinds: dict[Any, dict[str, Any]]) -> list[Any]:
    """Groups of options, kind -> what is set already, from options by name. ValueError for a name that none has."""
    home = {field.name: kind for kind, given in kinds.items() for field in fields(kind) if field.name not in given}
    if unknown := [name for name in options if name not in home]:
        raise ValueError(f"{what} has no option {unknown[0]!r}; {closest(unknown[0], sorted(home))}")
    return [kind(**given, **{name: options[name] for name in options if home[name] is kind})
            for kind, given in kinds.items()]  # fmt: skip
