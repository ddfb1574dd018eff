"""`flashar animate`: raster and diagonal decoding side by side on one clock, with the gate beside them.

Shapes: B images, H x W grid, N = H * W cells.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.console import progress_bar
from flashar_pl.files import replacing, require_new
from flashar_pl.options import (
    DeviceOptions,
    ModelOptions,
    SampleOptions,
    SamplingSettings,
    ShapeOptions,
    TextOptions,
    check_least,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from flashar_pl.backbones.condition import Batch
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding.engine import Engine
    from flashar_pl.decoding.loop import Progress
    from flashar_pl.decoding.request import DrawRequest
    from flashar_pl.decoding.samples import SampleSet
    from flashar_pl.grid import DecodePlan
    from flashar_pl.tokenizers import Tokenizer

TIMED = 5
"""Images of each order whose steps are timed, after one that is not; their medians count."""
STAND_STILL = 2.0
"""Seconds that the finished images are shown."""
GAP, LINE = 12, 18
"""Pixels between panels; height of a line of text."""
NARROWEST = 170
"""Pixels of a panel, so that its text fits."""
FORMATS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "quality": 85, "method": 4},
    ".gif": {"format": "GIF", "optimize": True},
}
"""Suffix -> how Pillow writes it."""


@dataclass(frozen=True)
class AnimateOptions(SampleOptions):
    """What to draw"""

    out: str = field(kw_only=True)
    """File to make, .webp or .gif; it must not exist."""
    raster: str | None = None
    """Checkpoint that draws the raster side, such as the one that FlashAR was post-trained from. Default: the
    horizontal head of --checkpoint."""
    clock: Literal["steps", "time"] = "steps"
    """What the clock counts: decoding steps, all equally long (steps), or the time that each step of one image took
    here, a median of five (time)."""
    seconds: float = 6.0
    """How long the animation shows the slower order decoding; then both stand still for 2 s."""
    frames: int = 60
    """Pictures of the animation."""
    size: int = 320
    """Longer side of a panel in pixels, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, seconds=0.1, frames=2, size=32)
        if Path(self.out).suffix.lower() not in FORMATS:
            raise ValueError(f"out is {self.out}; expected a file name that ends in .webp or .gif.")


@dataclass
class Side:
    """One order of decoding."""

    title: str
    engine: Engine
    samples: SampleSet
    plan: DecodePlan
    codes: Tensor
    """(B, H, W) int64, all decoded."""
    ends: list[float]
    """When each step ends on the clock, ascending."""
    unit: str

    def done(self, now: float) -> int:
        """Steps that have ended."""
        return bisect_right(self.ends, now * (1 + 1e-9))

    def status(self, done: int) -> str:
        """What stands under the pictures."""
        spent = f", {self.ends[done - 1] if done else 0:.0f} ms" if self.unit == "ms" else ""
        return f"step {done} of {self.plan.n_steps}{spent}"


def animate(
    draw: AnimateOptions,
    model: ModelOptions,
    sampling: SamplingSettings = SamplingSettings(),
    shape: ShapeOptions = ShapeOptions(),
    text: TextOptions = TextOptions(),
    compute: DeviceOptions = DeviceOptions(),
) -> Path:
    """Animate raster and diagonal decoding side by side.

    Makes one animated WebP or GIF. Both orders start together and share one clock; a cell appears when its step has
    ended, and is grey before. The gate map beside them (red where the horizontal head decides, blue where the vertical
    one does, mean over the images) appears with the diagonals. Both sides use the same conditions and seeds.

    Example:
        flashar animate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 0-9 --num-images 1
          --raster runs/demo/raster/checkpoints/last.ckpt --cfg-scale 1.5 --clock time --out demo.webp
    """
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.decoding.request import DrawRequest
    from flashar_pl.evaluate.quality import mean_gate
    from flashar_pl.models.flashar import FlashAR

    target = require_new(draw.out, "animation")
    source = open_checkpoint(model, compute)
    if not isinstance(source.model, FlashAR):
        raise ValueError(
            f"{source.path} is a {source.model.config()['kind']} model; expected a FlashAR checkpoint, or add "
            "--branch-layer for training-free diagonal decoding."
        )
    asked = DrawRequest.of(source, draw, sampling, shape, text)
    other = source if draw.raster is None else _open_raster(draw.raster, model.download, source, compute)
    tokenizer = source.matching_tokenizer(compute.device)
    sides = decode_both(draw, source, other, asked, compute)
    gate = mean_gate(source.model, pairs(sides[1]), asked.grid).float()  # (H, W)
    pictures = draw_frames(sides, gate, tokenizer, draw.frames, draw.size)
    milliseconds = [round(1000 * draw.seconds / draw.frames)] * draw.frames + [round(1000 * STAND_STILL)]
    with replacing(target) as part:
        options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
        pictures[0].save(part, **options, **FORMATS[target.suffix.lower()])
    ends = ", ".join(f"{side.title} {side.status(side.plan.n_steps).rpartition(' of ')[2]}" for side in sides)
    n, size = len(asked.wanted), target.stat().st_size
    print(f"animation: {n:,} images, clock {draw.clock} ({ends}): {target}, {size:,} bytes")
    return target


def _open_raster(path: str, download: bool, source: Source, compute: DeviceOptions) -> Source:
    """The model of the raster side. Raises ValueError unless it takes the same conditions and makes the same codes."""
    from flashar_pl.checkpoints.opening import open_checkpoint

    other = open_checkpoint(ModelOptions(path, download=download), compute)
    ours, theirs = source.model.backbone, other.model.backbone
    if (ours.vocabulary, ours.conditioning) != (theirs.vocabulary, theirs.conditioning):
        raise ValueError(
            f"--raster {path} has {theirs.vocabulary:,} codes and {theirs.conditioning}, {source.path} "
            f"{ours.vocabulary:,} codes and {ours.conditioning}; expected models of the same codes and conditions."
        )
    return other


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_both(
    draw: AnimateOptions, source: Source, other: Source, asked: DrawRequest, compute: DeviceOptions
) -> list[Side]:
    """Raster and diagonal, drawn under the same conditions and seeds, each with its clock."""
    from flashar_pl.decoding.engine import Engine
    from flashar_pl.pipeline import draw_asked

    sides = []
    for title, opened in (("raster", other), ("diagonal", source)):
        engine, plan = Engine(opened.model), opened.model.make_plan(title, *asked.grid)
        own = replace(asked, plan=title)
        samples, codes, _ = draw_asked(opened, engine, own, compute.batch_size, f"{title} steps")
        ends = [float(step) for step in range(1, plan.n_steps + 1)]
        sides.append(Side(title, engine, samples, plan, codes, ends, "steps"))
    if draw.clock == "time":
        time_steps(sides)
    return sides


def time_steps(sides: list[Side]) -> None:
    """Set the clocks to milliseconds: medians of the steps of one image, decoded in both orders by turns."""
    from flashar_pl.decoding.samples import draw_batch

    found: list[list[list[float]]] = [[] for _ in sides]
    times: list[float] = []

    def on_step(progress: Progress) -> None:
        progress.drawn[:, -1].cpu()  # waits for the device
        times.append(time.perf_counter())

    with progress_bar((1 + TIMED) * len(sides), "images timed") as advance:
        for _ in range(1 + TIMED):
            for side, measured in zip(sides, found, strict=True):
                times[:] = [time.perf_counter()]
                draw_batch(side.engine, replace(side.samples, batch_size=1), 0, on_step)
                measured.append([1000 * (end - begin) for begin, end in pairwise(times)])
                advance(1)
    for side, measured in zip(sides, found, strict=True):
        side.ends = list(accumulate(statistics.median(step) for step in zip(*measured[1:], strict=True)))
        side.unit = "ms"


def pairs(side: Side) -> Iterator[Batch]:
    """The drawn images with their conditions, one at a time: any model that decoded them has room for this."""
    from flashar_pl.backbones.condition import Batch

    for i, codes in enumerate(side.codes):
        yield Batch(codes[None], side.samples.condition.rows([i // side.samples.every]))


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_frames(sides: list[Side], gate: Tensor, tokenizer: Tokenizer, frames: int, size: int) -> list[Image.Image]:
    """frames + 1 pictures, evenly spaced on the clock from nothing decoded to everything."""
    from flashar_pl.pictures import gate_picture
    from flashar_pl.tokenizers.base import GREY

    last = max(side.ends[-1] for side in sides)
    step = sides[1].plan.step.view(gate.shape)  # (H, W)
    colours = gate_picture(gate)  # (3, h, w)
    factor = colours.shape[-1] // gate.shape[-1]

    @cache
    def panel(number: int, done: int) -> Image.Image:
        return fit(sheet(sides[number], done, tokenizer), size)

    def gate_panel(done: int, height: int) -> Image.Image:
        late = (step >= done).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return fit(colours.masked_fill(late, GREY), height, grow=True)

    pictures = []
    with progress_bar(frames + 1, "frames") as advance:
        for i in range(frames + 1):
            done = [side.done(last * i / frames) for side in sides]
            panels = [panel(number, n) for number, n in enumerate(done)]
            panels.append(gate_panel(done[1], max(NARROWEST, min(size, panels[1].height))))
            texts = [(side.title, side.status(n)) for side, n in zip(sides, done)]
            pictures.append(compose(panels, [*texts, ("gate", "red: H, blue: V")]))
            advance(1)
    return pictures


def sheet(side: Side, done: int, tokenizer: Tokenizer) -> Tensor:
    """The images after `done` steps, side by side: (3, h, w) uint8."""
    from flashar_pl.decoding.samples import decode_all
    from flashar_pl.pictures import tile

    late = side.plan.step.view(1, *side.samples.grid) >= done
    return tile(decode_all(tokenizer, side.codes.masked_fill(late, -1)), columns_of(len(side.codes)))  # (B, 3, h, w)


def columns_of(n: int) -> int:
    """Columns for n images: no fewer than rows, and no gap in the last row."""
    return next(columns for columns in range(1, n + 1) if columns**2 >= n and n % columns == 0)


def fit(image: Tensor, size: int, grow: bool = False) -> Image.Image:
    """An image (3, h, w) uint8 with a longer side of at most `size` pixels; grow: of `size` pixels."""
    from PIL import Image, ImageOps

    from flashar_pl.pictures import picture

    found = picture(image)
    larger = max(found.size) < size
    if larger and not grow:
        return found
    return ImageOps.contain(found, (size, size), Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def compose(panels: list[Image.Image], texts: list[tuple[str, str]]) -> Image.Image:
    """Panels from left to right on white, each with a line of text above and one below."""
    from PIL import Image, ImageDraw

    widths = [max(panel.width, NARROWEST) for panel in panels]
    height = max(panel.height for panel in panels)
    canvas = Image.new("RGB", (sum(widths) + GAP * (len(panels) + 1), height + 2 * LINE + 2 * GAP), "white")
    pen, left = ImageDraw.Draw(canvas), GAP
    for panel, width, (title, status) in zip(panels, widths, texts, strict=True):
        pen.text((left, GAP // 2), title, fill="black")
        canvas.paste(panel, (left, GAP // 2 + LINE))
        pen.text((left, GAP + LINE + height), status, fill="black")
        left += width + GAP
    return canvas
