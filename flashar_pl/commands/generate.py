"""`flashar generate`: images, a contact sheet and a JSON with every setting, from a checkpoint.

Shapes: N samples in all, B samples of a batch, H x W grid, T text positions, C text feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.checkpoint import Dtype, Plan, Weights, check_plan, find_device, open_checkpoint
from flashar_pl.commands.common import new_directory, parse_classes, require_new, versions, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.base import Condition
    from flashar_pl.models import GridModel
    from flashar_pl.sampling import SamplingSettings


def generate(
    *,
    checkpoint: str,
    out: str,
    classes: str | list[int] | None = None,
    text_features: str | None = None,
    num_images: int = 4,
    seed: int = 0,
    plan: Plan | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    batch_size: int = 16,
    weights: Weights = "auto",
    branch_layer: int | None = None,
    n_head: int | None = None,
    grid: str | None = None,
    tokenizer: str | None = None,
    codes_only: bool = False,
    device: str = "auto",
    dtype: Dtype = "fp32",
) -> Path:
    """Sample images from a checkpoint.

    Writes a new directory: one PNG per image, grid.png with one row per class or caption, codes.npy (N, H, W), and
    settings.json with every setting, seed and version. Sample i is drawn from seed + i, so it depends neither on the
    other samples nor, up to rounding, on the batch size. Nothing is written where a setting is wrong.

    Example:
        flashar generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --seed 1 --out samples/

    Args:
        checkpoint: Lightning checkpoint, converted directory, or official .pt or .safetensors file.
        out: directory to make; it must not exist.
        classes: class ids of a class-conditional model, such as 3,7 or 0-9.
        text_features: text features of a text-conditional model: .npy (N, T, C) or (T, C), or .npz or .safetensors
            with "features" and, where captions are left-padded, "mask" (N, T).
        num_images: images of each class or caption.
        seed: seed of the first sample; sample i uses seed + i.
        plan: decoding order: raster (H*W steps) or diagonal (H+W-1 steps). Default: the checkpoint's own.
        cfg_scale: classifier-free guidance s in u + s(c - u); 1 is off.
        cfg_interval: guide only steps with at most this number + 1 cells decoded before them. Default: every step.
        temperature: divides the logits.
        top_k: keep the k most likely codes; 0 is off.
        top_p: keep the most likely codes up to this probability; 1 is off.
        greedy: take the most likely code instead of drawing.
        batch_size: samples decoded together; a last partial batch is padded.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        n_head: attention heads, for official files of unpublished sizes.
        grid: code grid HEIGHTxWIDTH, where the checkpoint does not say it (official files) or another one is wanted.
        tokenizer: what decodes the codes, where the checkpoint does not say it: vq16:FILE, vq8:FILE, ibq:FILE,
            pixels:LEVELS, or a JSON object.
        codes_only: write codes.npy and settings.json, no images; needs no tokenizer.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations; softmax and sampling stay in float32 and float64.
    """
    arguments = dict(locals())
    import numpy as np

    from flashar_pl.sampling import SamplingSettings
    from flashar_pl.tokenizers import build_tokenizer

    settings = SamplingSettings(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy)
    _check_counts(num_images, batch_size)
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
    height_width = source.need_grid()
    plan_name = check_plan(source.model, plan, height_width)
    condition, labels = make_condition(source.model, classes, text_features, num_images)
    decoder = None if codes_only else build_tokenizer(source.need_tokenizer()).to(find_device(device))
    if decoder is not None and decoder.vocabulary != source.model.backbone.vocabulary:
        raise ValueError(
            f"the tokenizer has {decoder.vocabulary} codes, the model {source.model.backbone.vocabulary}; "
            "give the tokenizer that made the training codes: --tokenizer."
        )
    seeds = [seed + i for i in range(len(labels))]
    started = time.perf_counter()
    with progress_bar(len(labels), "images") as advance:
        codes = sample_codes(
            source.model, condition, height_width, plan_name, settings, seeds, batch_size, advance
        )  # (N, H, W)
    seconds = time.perf_counter() - started
    with new_directory(target, "samples") as folder:
        np.save(folder / "codes.npy", codes.numpy())
        files = [] if decoder is None else _write_images(folder, codes, decoder, labels, seeds, num_images, batch_size)
        images = [{"label": label, "seed": seed} for label, seed in zip(labels, seeds, strict=True)]
        for entry, name in zip(images, files, strict=False):
            entry["file"] = name
        write_json(
            folder / "settings.json",
            {
                "command": "generate",
                "settings": {**arguments, "plan": plan_name, "device": str(find_device(device))},
                "checkpoint": source.facts(),
                "images": images,
                "seconds": seconds,
                "versions": versions(),
            },
        )
    print(f"{len(labels)} samples ({plan_name} plan) in {seconds:.1f} s: {target}")
    return target


def _check_counts(num_images: int, batch_size: int) -> None:
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more.")


def _write_images(
    folder: Path, codes: Tensor, decoder: Any, labels: list[str], seeds: list[int], columns: int, batch_size: int
) -> list[str]:
    """Decode and write every image and the contact sheet; names of the files."""
    import torch

    from flashar_pl.training.images import save_png, tile

    device = next((t.device for t in (*decoder.parameters(), *decoder.buffers())), torch.device("cpu"))
    with torch.no_grad():
        images = torch.cat([decoder.decode(part.to(device)).cpu() for part in codes.split(batch_size)])
    names = [f"{i:05d}_{label}_seed{seed}.png" for i, (label, seed) in enumerate(zip(labels, seeds, strict=True))]
    for image, name in zip(images, names, strict=True):
        save_png(image, folder / name)
    save_png(tile(images, columns), folder / "grid.png")
    return names


def make_condition(
    model: GridModel, classes: str | list[int] | None, text_features: str | None, num_images: int
) -> tuple[Condition, list[str]]:
    """The condition of N = (classes or captions) x num_images samples, and a file-name label for each.

    Raises:
        ValueError: both or neither are given, or they do not fit the model.
    """
    import torch

    from flashar_pl.backbones.base import TextFeatures

    if (classes is None) == (text_features is None):
        raise ValueError("give either --classes (class-conditional models) or --text-features (text-conditional).")
    condition: Condition
    if classes is not None:
        ids = parse_classes(classes)
        condition = torch.tensor(ids).repeat_interleave(num_images)
        labels = [f"class{c}" for c in ids for _ in range(num_images)]
    else:
        assert text_features is not None
        read = read_text_features(text_features)
        mask = None if read.mask is None else read.mask.repeat_interleave(num_images, dim=0)
        condition = TextFeatures(read.features.repeat_interleave(num_images, dim=0), mask)
        labels = [f"text{i}" for i in range(len(read)) for _ in range(num_images)]
    model.backbone.check_condition(condition)
    return condition, labels


def read_text_features(path: str) -> Any:
    """`TextFeatures` from a .npy, .npz or .safetensors file; a single caption (T, C) becomes a batch of one.

    Raises:
        ValueError: no such file, another format, or no array "features".
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from flashar_pl.backbones.base import TextFeatures

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no text features at {file}; expected a .npy, .npz or .safetensors file.")
    if file.suffix == ".npy":
        arrays = {"features": torch.from_numpy(np.load(file, allow_pickle=False))}
    elif file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: torch.from_numpy(content[name]) for name in content.files}
    elif file.suffix == ".safetensors":
        arrays = load_file(file)
    else:
        raise ValueError(f"text features at {file}: expected a .npy, .npz or .safetensors file.")
    unknown = arrays.keys() - {"features", "mask"}
    if "features" not in arrays or unknown:
        raise ValueError(f'{file} holds {", ".join(sorted(arrays))}; expected "features" and, if padded, "mask".')
    features, mask = arrays["features"], arrays.get("mask")
    if features.ndim == 2:
        features, mask = features[None], None if mask is None else mask[None]
    return TextFeatures(features.float(), None if mask is None else mask.bool())


def sample_codes(
    model: GridModel,
    condition: Condition,
    grid: tuple[int, int],
    plan: str,
    settings: SamplingSettings,
    seeds: list[int],
    batch_size: int,
    advance: Callable[[int], Any] | None = None,
) -> Tensor:
    """Codes (N, H, W) int64 on the CPU, in batches of exactly `batch_size` rows: a last partial batch is filled up.

    The fill repeats the last sample and is dropped; results so depend on each sample's own seed and condition only.
    advance: called with the number of finished samples after every batch.
    """
    from dataclasses import asdict

    import torch

    from flashar_pl import decoding
    from flashar_pl.backbones.base import TextFeatures

    rows = len(seeds)
    parts = []
    for start in range(0, rows, batch_size):
        index = torch.arange(start, start + batch_size).clamp(max=rows - 1)  # (B,)
        part: Condition
        if isinstance(condition, TextFeatures):
            part = TextFeatures(condition.features[index], None if condition.mask is None else condition.mask[index])
        elif isinstance(condition, torch.Tensor):
            part = condition[index]
        else:
            part = [condition[i] for i in index.tolist()]
        codes = decoding.generate(model, part, grid, plan, seeds=[seeds[i] for i in index.tolist()], **asdict(settings))
        done = min(batch_size, rows - start)
        parts.append(codes[:done].cpu())
        if advance is not None:
            advance(done)
    return torch.cat(parts)


class progress_bar:
    """A progress bar on stderr whose target is a callable: `with progress_bar(n, unit) as advance: advance(1)`."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, disable=None)

    def __enter__(self) -> Callable[[int], Any]:
        return self._bar.update

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
