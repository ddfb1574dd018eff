"""`flashar generate`: images, a contact sheet and a JSON with every setting, from a checkpoint.

Shapes: N samples in all, B samples of a batch, H x W grid.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.checkpoint import Dtype, Plan, Weights, check_plan, find_device, open_checkpoint
from flashar_pl.commands.common import new_directory, progress_bar, require_new, versions, write_json
from flashar_pl.commands.prompts import TextSettings, Wanted, ask, choose_grid, is_emu, pick, read_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.base import Condition
    from flashar_pl.commands.checkpoint import Source
    from flashar_pl.models import GridModel
    from flashar_pl.sampling import SamplingSettings
    from flashar_pl.tokenizers import Tokenizer


BATCH_SIZE = 16
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
    batch_size: int | None = None,
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
        batch_size: samples decoded together; a last partial batch is padded. Default: 16; with Emu3.5, where padding
            is dear, not more than there are images.
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
    plan_name = check_plan(source.model, plan, height_width)
    text = TextSettings(assets, text_encoder, negative_prompt)
    wanted = ask(
        source, height_width, num_images, settings.guided,
        prompts=asked, classes=classes, text_features=text_features, text=text,
    )  # fmt: skip
    if batch_size is None:
        batch_size = min(BATCH_SIZE, len(wanted)) if is_emu(source) else BATCH_SIZE
    if is_emu(source) and not settings.guided:
        print("note: drawn without guidance; Emu3.5 is published with --cfg-scale 5.", file=sys.stderr)
    decoder = None if codes_only else matching_tokenizer(source, device)
    seeds = [seed + i for i in range(len(wanted))]
    started = time.perf_counter()
    codes = draw_codes(source.model, wanted, height_width, plan_name, settings, seeds, batch_size)  # (N, H, W)
    seconds = time.perf_counter() - started
    with new_directory(target, "samples") as folder:
        np.save(folder / "codes.npy", codes.numpy())
        files = [] if decoder is None else _write_images(folder, codes, decoder, wanted, seeds, num_images)
        place = str(find_device(device))
        facts = {"grid": list(height_width), "plan": plan_name, "device": place, "batch_size": batch_size}
        write_json(
            folder / "settings.json",
            {
                "command": "generate",
                "settings": {**arguments, **facts, "dtype": source.dtype},
                "checkpoint": source.facts(),
                "images": describe_images(wanted, seeds, files),
                "seconds": seconds,
                "versions": versions(),
            },
        )
    print(f"{len(wanted)} samples ({plan_name} plan) in {seconds:.1f} s: {target}")
    return target


def matching_tokenizer(source: Source, device: str) -> Tokenizer:
    """The tokenizer that decodes the checkpoint's codes, on a device. Raises ValueError where it is not the model's."""
    from flashar_pl.tokenizers import build_tokenizer

    decoder = build_tokenizer(source.need_tokenizer()).to(find_device(device))
    if decoder.vocabulary != source.model.backbone.vocabulary:
        raise ValueError(
            f"the tokenizer has {decoder.vocabulary} codes, the model {source.model.backbone.vocabulary}; "
            "give the tokenizer that made the training codes: --tokenizer."
        )
    return decoder


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


def _check_counts(num_images: int, batch_size: int | None) -> None:
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more.")


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

    from flashar_pl.training.images import save_png, tile

    device = next((t.device for t in (*decoder.parameters(), *decoder.buffers())), torch.device("cpu"))
    together = max(1, PIXELS // (codes[0].numel() * decoder.downsample**2))
    with torch.no_grad():
        images = torch.cat([decoder.decode(part.to(device)).cpu() for part in codes.split(together)])
    names = [f"{i:05d}_{label}_seed{seed}.png" for i, (label, seed) in enumerate(zip(wanted.labels, seeds))]
    for image, name in zip(images, names, strict=True):
        save_png(image, folder / name)
    save_png(tile(images, columns), folder / "grid.png")
    return names


def draw_codes(
    model: GridModel,
    wanted: Wanted,
    grid: tuple[int, int],
    plan: str,
    settings: SamplingSettings,
    seeds: list[int],
    batch_size: int,
) -> Tensor:
    """`sample_codes` with a progress bar that counts decoding steps."""
    batches = -(-len(seeds) // batch_size)
    with progress_bar(batches * model.make_plan(plan, *grid).n_steps, "steps") as advance:
        return sample_codes(
            model, wanted.condition, grid, plan, settings, seeds, batch_size,
            unconditional=wanted.unconditional, on_step=lambda: advance(1),
        )  # fmt: skip


def sample_codes(
    model: GridModel,
    condition: Condition,
    grid: tuple[int, int],
    plan: str,
    settings: SamplingSettings,
    seeds: list[int],
    batch_size: int,
    advance: Callable[[int], Any] | None = None,
    unconditional: Condition | None = None,
    on_step: Callable[[], Any] | None = None,
) -> Tensor:
    """Codes (N, H, W) int64 on the CPU, in batches of exactly `batch_size` rows: a last partial batch is filled up.

    The fill repeats the last sample and is dropped; results so depend on each sample's own seed and condition only.
    advance: called with the number of finished samples after every batch. unconditional: what guidance leads away
    from, N samples; None = the model's own. on_step: called after every decoding step.
    """
    from dataclasses import asdict

    import torch

    from flashar_pl import decoding

    rows = len(seeds)
    parts = []
    for start in range(0, rows, batch_size):
        index = [min(i, rows - 1) for i in range(start, start + batch_size)]
        codes = decoding.generate(
            model,
            pick(condition, index),
            grid,
            plan,
            seeds=[seeds[i] for i in index],
            unconditional=None if unconditional is None else pick(unconditional, index),
            on_step=on_step,
            **asdict(settings),
        )
        done = min(batch_size, rows - start)
        parts.append(codes[:done].cpu())
        if advance is not None:
            advance(done)
    return torch.cat(parts)
