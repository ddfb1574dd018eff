"""`flashar generate`: images, a contact sheet and a JSON with every setting, from a checkpoint.

Shapes: N samples in all, B samples of a batch, H x W grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.console import versions
from flashar_pl.files import new_directory, require_new, write_json
from flashar_pl.options import (
    EngineOptions,
    ModelOptions,
    SampleOptions,
    SamplingSettings,
    ShapeOptions,
    SharingOptions,
    TextOptions,
    as_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.decoding.prompts import Wanted
    from flashar_pl.ranks import Rank
    from flashar_pl.tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateOptions(SampleOptions):
    """What to draw"""

    out: str = field(kw_only=True)
    """Directory to make; it must not exist."""
    codes_only: bool = False
    """Write codes.npy and settings.json, no images; needs no tokenizer."""


def generate(
    draw: GenerateOptions,
    model: ModelOptions,
    sampling: SamplingSettings = SamplingSettings(),
    shape: ShapeOptions = ShapeOptions(),
    text: TextOptions = TextOptions(),
    engine: EngineOptions = EngineOptions(),
    sharing: SharingOptions = SharingOptions(),
) -> Path:
    """Sample images from a checkpoint.

    Writes a new directory: one PNG per image, grid.png with one row per prompt or class, codes.npy (N, H, W), and
    settings.json with every setting, seed and version. Sample i is drawn from seed + i, so it depends neither on the
    other samples nor, up to rounding, on the batch size. Nothing is written where a setting is wrong.

    Example:
        flashar generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --seed 1 --out samples/
        flashar generate --checkpoint Emu3.5-Image-FlashAR --assets Emu3.5-Image --tokenizer Emu3.5-VisionTokenizer
          --prompt "a fox in the snow" --cfg-scale 5 --aspect-ratio 16:9 --batch-size 4 --out foxes/
    """
    from flashar_pl.decoding.tensor_parallel import on_devices

    require_new(draw.out, "samples")
    work = partial(_generate, draw, model, sampling, shape, text, engine, sharing)
    return on_devices(sharing.tensor_parallel, work, engine)


def _generate(draw: GenerateOptions, model: ModelOptions, sampling: SamplingSettings, shape: ShapeOptions,
              text: TextOptions, engine: EngineOptions, sharing: SharingOptions, rank: Rank) -> Path:  # fmt: skip
    """As one of the ranks that share the model; the first one writes."""
    from flashar_pl.decoding.build import build_engine, choose_format
    from flashar_pl.decoding.request import DrawRequest
    from flashar_pl.decoding.tensor_parallel import open_share
    from flashar_pl.devices import peak_memory
    from flashar_pl.pipeline import draw_asked

    target, first = Path(draw.out), rank.rank == 0
    source = open_share(model, engine, rank, sharing.tensor_parallel)
    asked = DrawRequest.of(source, draw, sampling, shape, text, engine.plan)
    wanted, grid, plan, sampling = asked.wanted, asked.grid, asked.plan, asked.sampling
    for note in asked.notes(source):
        rank.say(f"note: {note}")
    pictures = first and not draw.codes_only
    decoder = source.matching_tokenizer(engine.device, engine.pixel_dtype) if pictures else None
    form = choose_format(source.model, engine, plan)
    drawing = build_engine(source, replace(engine, weight_format=form), plan)
    with peak_memory(drawing.device) as peak:
        samples, codes, seconds = draw_asked(source, drawing, asked, engine.batch_size, "steps", rank)  # (N, H, W)
    if not first:
        return target
    used: dict[str, Any] = {"device": str(drawing.device), "runner": drawing.runner}
    if forwards := drawing.forwards[: len(wanted)]:
        used["forwards"] = {"mean": sum(forwards) / len(forwards), "most": max(forwards)}
        used["codes_per_forward"] = grid[0] * grid[1] / used["forwards"]["mean"]
    del drawing  # its buffers and graphs may fill the device; decoding to pixels needs room
    with new_directory(target, "samples") as folder:
        images = _write_samples(folder, codes, decoder, wanted, draw)
        facts = {"grid": list(grid), "plan": plan, "batch_size": samples.batch_size, **used, "weight_format": form,
                 "dtype": source.dtype,
                 **({} if decoder is None else {"decode_dtype": decoder.decode_dtype})}  # fmt: skip
        record = {
            "command": "generate",
            "settings": {**as_settings(draw, model, sampling, shape, text, engine, sharing), **facts},
            "checkpoint": source.facts(),
            "images": images,
            "seconds": seconds,
            "peak_memory_bytes": peak.bytes or None,
            "versions": versions(),
        }
        write_json(folder / "settings.json", record)
    if forwards:
        mean, most = used["forwards"].values()
        print(f"{mean:.1f} forwards an image, at most {most}; {used['codes_per_forward']:.2f} codes a forward")
    print(f"samples: {len(wanted):,} ({plan} plan, {used['runner']}) in {seconds:.1f} s: {target}")
    return target


def _write_samples(
    folder: Path, codes: Tensor, decoder: Tokenizer | None, wanted: Wanted, draw: GenerateOptions
) -> list[dict[str, Any]]:
    """Write the codes and, with a decoder, every image and the contact sheet. What is known of each sample."""
    import numpy as np

    from flashar_pl.decoding.samples import decode_all
    from flashar_pl.pictures import save_png, tile

    np.save(folder / "codes.npy", codes.numpy())
    seeds = [draw.seed + i for i in range(len(wanted))]
    columns: dict[str, Any] = {"label": wanted.labels, "seed": seeds, "prompt": wanted.prompts}
    if decoder is not None:
        images = decode_all(decoder, codes)  # (N, 3, h, w)
        names = [f"{i:05d}_{label}_seed{seed}.png" for i, (label, seed) in enumerate(zip(wanted.labels, seeds))]
        for image, name in zip(images, names, strict=True):
            save_png(image, folder / name)
        save_png(tile(images, draw.num_images), folder / "grid.png")
        columns["file"] = names
    known = {name: values for name, values in columns.items() if values}
    return [dict(zip(known, row)) for row in zip(*known.values(), strict=True)]
