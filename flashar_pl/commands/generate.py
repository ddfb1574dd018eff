"""`flashar generate`: images, a contact sheet and a JSON with every setting, from a checkpoint.

Shapes: N samples in all, B samples of a batch, H x W grid.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.checkpoints.opening import check_plan, check_top_k, open_checkpoint
from flashar_pl.console import plural, progress_bar, versions
from flashar_pl.decoding.build import build_engine, choose_format
from flashar_pl.decoding.prompts import TextSettings, Wanted, ask, choose_grid, is_emu, read_prompts
from flashar_pl.files import new_directory, require_new, write_json
from flashar_pl.options import Dtype, Plan, Runner, WeightFormat, Weights
from flashar_pl.planner.room import Room

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.samples import SampleSet
    from flashar_pl.sampling import SamplingSettings
    from flashar_pl.tokenizers import Tokenizer


BATCH_SIZE = 16
"""Unless fewer fit."""
PIXELS = 2**20
"""Decoded to images together: four of 512 x 512, whose activations in Emu3.5's decoder take about 4 GB."""


def generate(
    *,
    checkpoint: str,
    out: str,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    negative_prompt: str | None = None,
    classes: str | list[int] | None = None,
    text_features: str | None = None,
    aspect_ratio: str | None = None,
    image_size: int | None = None,
    num_images: int = 4,
    seed: int = 0,
    plan: Plan | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    batch_size: int | Literal["auto"] | None = None,
    runner: Runner = "auto",
    weight_format: WeightFormat = "auto",
    weights: Weights = "auto",
    branch_layer: int | None = None,
    n_head: int | None = None,
    grid: str | None = None,
    assets: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    codes_only: bool = False,
    device: str = "auto",
    dtype: Dtype | None = None,
) -> Path:
    """Sample images from a checkpoint.

    Writes a new directory: one PNG per image, grid.png with one row per prompt or class, codes.npy (N, H, W), and
    settings.json with every setting, seed and version. Sample i is drawn from seed + i, so it depends neither on the
    other samples nor, up to rounding, on the batch size. Nothing is written where a setting is wrong.

    Example:
        flashar generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --seed 1 --out samples/
        flashar generate --checkpoint Emu3.5-Image-FlashAR --assets Emu3.5-Image --tokenizer Emu3.5-VisionTokenizer
          --prompt "a fox in the snow" --cfg-scale 5 --aspect-ratio 16:9 --batch-size 4 --out foxes/

    Args:
        checkpoint: Lightning checkpoint, converted directory, official .pt or .safetensors file, or the directory of
            BAAI's Emu3.5-Image or of the FlashAR authors' Emu3.5 weights.
        out: directory to make; it must not exist.
        prompt: text to draw, with a model conditioned on text; may be given several times.
        prompts: file with one prompt a line.
        negative_prompt: what guidance leads away from. Default: the unconditional prompt the model knows, for Emu3.5
            the official one, for the FlashAR authors' weights their template with an empty text.
        classes: class ids of a class-conditional model, such as 3,7 or 0-9.
        text_features: text features of a text-conditional model: .npy (N, T, C) or (T, C), or .npz or .safetensors
            with "features" and, where captions are left-padded, "mask" (N, T).
        aspect_ratio: width to height: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16, 2:1, 1:2 or 21:9;
            or a grid HEIGHTxWIDTH in codes.
        image_size: side in pixels of the square with the area of the images, at 16 pixels per code. Default: 512 for
            Emu3.5 and with a named aspect ratio, otherwise the checkpoint's own grid.
        num_images: images of each prompt, class or caption.
        seed: seed of the first sample; sample i uses seed + i.
        plan: decoding order: raster (H*W steps) or diagonal (H+W-1 steps). Default: the checkpoint's own.
        cfg_scale: classifier-free guidance s in u + s(c - u); 1 is off.
        cfg_interval: guide only steps with at most this number + 1 cells decoded before them. Default: every step.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 is off.
        top_p: keep the most likely codes up to this probability; 1 is off.
        greedy: take the most likely code instead of drawing.
        batch_size: samples decoded together; a last partial batch is padded. auto is the largest that fits, up to 64
            on a CPU and 1024 on a GPU. Default: 16, or fewer where fewer fit; with Emu3.5, where padding is dear, not
            more than there are images.
        runner: what drives decoding: eager, compiled (torch.compile of the blocks), graphs (CUDA graphs) or
            compiled-graphs. auto is graphs on a GPU, eager on a CPU. All draw the same codes up to rounding.
        weight_format: plain, packed (laid out for a CPU's matrix products), int8 or fp8 (rounded; needs torchao);
            auto is packed or plain on a CPU, whichever measured faster for such a model, and plain on a GPU.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        n_head: attention heads, for official files of unpublished sizes.
        grid: code grid HEIGHTxWIDTH, where the checkpoint does not say it (official files) or another one is wanted.
        assets: directory with emu3.tiktoken and emu3_vision_tokens.txt, for prompts of Emu3.5. Default: the
            checkpoint's own, or the one it was trained with.
        text_encoder: directory of the T5 encoder (google/flan-t5-xl), for prompts of LlamaGen.
        tokenizer: what decodes the codes, where the checkpoint does not say it: the directory of Emu3.5's, vq16:FILE,
            vq8:FILE, ibq:FILE, pixels:LEVELS, or a JSON object.
        codes_only: write codes.npy and settings.json, no images; needs no tokenizer.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations; softmax and sampling stay in float32 and float64. Default: fp32, for
            official Emu3.5 directories that of the files.
    """
    arguments = dict(locals())
    import numpy as np

    from flashar_pl.devices import peak_memory
    from flashar_pl.sampling import SamplingSettings

    settings = SamplingSettings(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy)
    _check_counts(num_images, batch_size)
    asked = read_prompts(prompt, prompts)
    if grid is not None and (aspect_ratio, image_size) != (None, None):
        raise ValueError("--grid is given with --aspect-ratio or --image-size; give one of them.")
    target = require_new(out, "samples")
    source = open_checkpoint(
        checkpoint,
        weights=weights,
        n_head=n_head,
        branch_layer=branch_layer,
        grid=grid,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )
    height_width = choose_grid(source, aspect_ratio, image_size)
    check_top_k(source.model, top_k)
    plan_name = check_plan(source.model, plan, height_width)
    wanted = ask(
        source, height_width, num_images, settings.guided, prompts=asked, classes=classes, text_features=text_features,
        text=TextSettings(assets, text_encoder, negative_prompt),
    )  # fmt: skip
    _check_seeds(seed, len(wanted))
    _notes(source, wanted, settings, height_width)
    decoder = None if codes_only else source.matching_tokenizer(device)
    form = choose_format(source.model, weight_format, runner, plan_name)
    engine = build_engine(source, runner, form, plan_name)
    size = fitting_batch(source, wanted, height_width, plan_name, settings, batch_size, engine.prefix_bucket)
    samples = samples_of(wanted, height_width, plan_name, settings, size, seed)
    with peak_memory(engine.device) as peak:
        started = time.perf_counter()
        codes = draw_codes(engine, samples)  # (N, H, W)
        seconds = time.perf_counter() - started
    used = {"device": str(engine.device), "runner": engine.runner}
    del engine  # its buffers and graphs may fill the device; decoding to pixels needs room
    seeds = [seed + i for i in range(len(wanted))]
    with new_directory(target, "samples") as folder:
        np.save(folder / "codes.npy", codes.numpy())
        files = [] if decoder is None else _write_images(folder, codes, decoder, wanted, seeds, num_images)
        facts = {"grid": list(height_width), "plan": plan_name, "batch_size": size, **used, "weight_format": form,
                 "dtype": source.dtype}  # fmt: skip
        record = {
            "command": "generate",
            "settings": {**arguments, **facts},
            "checkpoint": source.facts(),
            "images": describe_images(wanted, seeds, files),
            "seconds": seconds,
            "peak_memory_bytes": peak.bytes or None,
            "versions": versions(),
        }
        write_json(folder / "settings.json", record)
    print(f"{plural(len(wanted), 'sample')} ({plan_name} plan, {used['runner']}) in {seconds:.1f} s: {target}")
    return target


def _notes(source: Source, wanted: Wanted, settings: SamplingSettings, grid: tuple[int, int]) -> None:
    """What the user may not have meant, on standard error."""
    import torch

    from flashar_pl.backbones import LlamaGen

    backbone, condition = source.model.backbone, wanted.condition
    trained = source.description.grid
    if trained is not None and tuple(trained) != grid and not is_emu(source):
        sizes = f"{grid[0]}x{grid[1]} codes; the model was trained on {trained[0]}x{trained[1]}"
        print(f"note: drawn on {sizes} and knows no other.", file=sys.stderr)
    if settings.cfg_interval is not None and not settings.guided:
        print("note: --cfg-interval does nothing without guidance; give --cfg-scale.", file=sys.stderr)
    if wanted.prompts is not None and not all(text.strip() for text in wanted.prompts):
        print("note: a prompt is empty; its images are drawn without a description.", file=sys.stderr)
    if is_emu(source) and not settings.guided:
        print("note: drawn without guidance; Emu3.5 is published with --cfg-scale 5.", file=sys.stderr)
    if isinstance(backbone, LlamaGen) and isinstance(condition, torch.Tensor):
        null = backbone.config.num_classes
        if bool((condition == null).any()):
            print(
                f"note: class {null} means no class, what guidance leads away from; classes are 0 to {null - 1}.",
                file=sys.stderr,
            )


def fitting_batch(
    source: Source,
    wanted: Wanted,
    grid: tuple[int, int],
    plan: str,
    settings: SamplingSettings,
    batch_size: int | Literal["auto"] | None,
    bucket: int,
) -> int:
    """The number of samples to decode together; prompts are padded to a multiple of `bucket`.

    Raises ValueError for a number that does not fit.
    """
    from flashar_pl.planner import model_sizes

    model, most, longest = source.model, None, None
    if is_emu(source):  # conditions are whole prompts
        most = len(wanted)
        prompts = [part for part in (wanted.condition, wanted.unconditional) if isinstance(part, list)]
        longest = -(-max(len(ids) for part in prompts for ids in part) // bucket) * bucket
    room = Room(
        model_sizes(model.config()), (plan,), grid, model.device, next(model.parameters()).dtype, settings.guided,
        prefix=longest, weight_copies=0,
    )  # fmt: skip
    if batch_size is None:
        return room.choose(max(1, room.largest(min(BATCH_SIZE, most or BATCH_SIZE))))
    return room.choose(batch_size, most=len(wanted))


def samples_of(
    wanted: Wanted, grid: tuple[int, int], plan: str, settings: SamplingSettings, batch_size: int, seed: int
) -> SampleSet:
    """The numbered samples."""
    from flashar_pl.decoding.samples import SampleSet

    return SampleSet.of(wanted.condition, grid, plan, settings, batch_size, seed, wanted.unconditional)


def describe_images(wanted: Wanted, seeds: list[int], files: list[str]) -> list[dict[str, Any]]:
    """What is known of each image, for settings.json; `files` is empty where none were written."""
    entries: list[dict[str, Any]] = []
    for i, (label, seed) in enumerate(zip(wanted.labels, seeds, strict=True)):
        entry = {"label": label, "seed": seed}
        if wanted.prompts is not None:
            entry["prompt"] = wanted.prompts[i]
        if files:
            entry["file"] = files[i]
        entries.append(entry)
    return entries


def _check_counts(num_images: int, batch_size: int | Literal["auto"] | None) -> None:
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more.")


def _check_seeds(seed: int, n: int) -> None:
    if not -(2**63) <= seed <= 2**64 - n:
        raise ValueError(f"seed is {seed}; expected a whole number of 64 bits, and room for {plural(n, 'sample')}.")


def _write_images(
    folder: Path,
    codes: Tensor,
    decoder: Tokenizer,
    wanted: Wanted,
    seeds: list[int],
    columns: int,
) -> list[str]:
    """Decode and write every image and the contact sheet; names of the files."""
    import torch

    from flashar_pl.pictures import save_png, tile

    device = next((t.device for t in (*decoder.parameters(), *decoder.buffers())), torch.device("cpu"))
    together = max(1, PIXELS // (codes[0].numel() * decoder.downsample**2))
    with torch.no_grad():
        images = torch.cat([decoder.decode(part.to(device)).cpu() for part in codes.split(together)])
    names = [f"{i:05d}_{label}_seed{seed}.png" for i, (label, seed) in enumerate(zip(wanted.labels, seeds))]
    for image, name in zip(images, names, strict=True):
        save_png(image, folder / name)
    save_png(tile(images, columns), folder / "grid.png")
    return names


def draw_codes(engine: Engine, samples: SampleSet) -> Tensor:
    """All samples' codes (N, H, W), with a progress bar that counts decoding steps."""
    from flashar_pl.decoding import samples as decoding

    steps = samples.batches * engine.model.make_plan(samples.plan, *samples.grid).n_steps
    with progress_bar(steps, "steps") as advance:
        return decoding.draw_codes(engine, samples, on_step=lambda _: advance(1))
