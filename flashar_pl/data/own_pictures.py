"""The job behind `flashar tokenize images`: somebody's pictures, split, through a tokenizer that is given or trained.

Shapes: n pictures, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.console import progress_bar
from flashar_pl.data.encode import ImageEncoder, weights_hash
from flashar_pl.data.images import SquareCrop
from flashar_pl.data.jobs import PictureOptions, SmallVQOptions, open_tokenizer
from flashar_pl.data.order import permutation, stream
from flashar_pl.data.pictures import split_pictures
from flashar_pl.data.sources import Source
from flashar_pl.data.tokenise import TOKENIZER, Job, tokenise
from flashar_pl.files import new_directory, require_new, write_json
from flashar_pl.image_files import Unreadable
from flashar_pl.options import CodecOptions, PackOptions, ShardOptions
from flashar_pl.pictures import save_png, tile
from flashar_pl.ranks import Rank
from flashar_pl.tensor_files import save_checked
from flashar_pl.text_files import read_json
from flashar_pl.tokenizers.small_vq import psnr, small_spec, train_small_vq

WEIGHTS = "tokenizer.safetensors"
"""File of a trained tokenizer, in the layout of LlamaGen's; every option that takes vq16:FILE reads it."""
FACTS = "tokenizer.json"
"""Beside it: its sizes and numbers."""
TRAINED_SIDE, WEIGHTS_SIDE, PIXELS_SIDE = 64, 256, 16
"""Sides of the squares unless told: with a tokenizer trained here, with published weights, with grey levels."""
MOST_PICTURES, SHOWN = 4096, 8
"""Pictures held in memory to train a tokenizer; pictures shown beside their reconstructions."""
PREPARATION = {
    "crop": "centre square, halved with a box filter while twice too large, then bicubic",
    "exif": "turned upright",
    "modes": "as RGB: transparency on white, 16 bits to their high 8, CMYK and palettes converted",
}
"""What `SquareCrop` does, for the output and the manifest."""


def tokenise_pictures(
    asked: PictureOptions, codec: CodecOptions, trained: SmallVQOptions, pack: PackOptions, rank: Rank
) -> dict[str, dict[str, Any]] | None:
    """Split, train a tokenizer where none is given, and tokenise the three splits, each as `tokenise` does.

    Returns split -> report on the first rank.

    Raises:
        ValueError: as `split_pictures` and `tokenise`, or no picture to train a tokenizer on.
    """
    sources, how = split_pictures(asked.folder, asked.one_class)
    if rank.rank == 0:
        print(f"{asked.folder}: {how}", flush=True)
        for what, done in PREPARATION.items():
            print(f"{what}: {done}", flush=True)
    own = codec.weights is None and ":" not in (codec.tokenizer or "")
    size = asked.image_size or (TRAINED_SIDE if own else usual_side(codec))
    if own:
        if codec.tokenizer is not None:
            raise ValueError(f"--tokenizer {codec.tokenizer} has no weights; add --weights FILE, or leave both out.")
        folder = Path(pack.out) / TOKENIZER
        rank.first(partial(_train_once, sources, size, trained, folder, rank.device))
        codec = CodecOptions(**asdict(codec) | {"weights": str(folder / WEIGHTS)})
    reports = {}
    for split, source in sources.items():
        shards = ShardOptions(**asdict(pack), split=split)  # type: ignore[arg-type]
        reports[split] = tokenise(partial(_job, source, size, asked, codec, shards), rank)
    return reports if rank.rank == 0 else None  # type: ignore[return-value]


def usual_side(codec: CodecOptions) -> int:
    """The side in pixels for a tokenizer that is given: what it was trained on, where it was trained here."""
    kind, _, value = (codec.tokenizer or "").partition(":")
    facts = Path(codec.weights or value).expanduser().with_name(FACTS)
    if kind == "pixels":
        return PIXELS_SIDE
    side = read_json(facts).get("image_size") if facts.is_file() else None
    return side if isinstance(side, int) else WEIGHTS_SIDE


def _job(
    source: Source, size: int, asked: PictureOptions, codec: CodecOptions, shards: ShardOptions, device: torch.device
) -> Job:
    """One split."""
    model = open_tokenizer(codec, "vq16", device)
    if size % model.downsample:
        raise ValueError(f"image_size is {size}; expected a multiple of {model.downsample} (pixels of a code).")
    crops, cells = 1 if asked.no_mirror else 2, size // model.downsample
    return Job(
        shards,
        source,
        SquareCrop(size),
        encode=ImageEncoder(model, device, crops, size),
        name=Path(asked.folder).expanduser().resolve().name or "pictures",
        tokenizer=model.config(),
        vocabulary=model.vocabulary,
        batch=max(1, (codec.batch_size or 32) // crops),
        settings={"image_size": size, "weights_hash": weights_hash(model)},
        crops=crops,
        grid=(cells, cells),
        preparation={"side": f"{size} pixels", **PREPARATION},
    )


def _train_once(
    sources: dict[str, Source], size: int, options: SmallVQOptions, out: Path, device: torch.device
) -> None:
    """`train_tokenizer`, unless an earlier run has. Raises ValueError where that had other settings."""
    if not (out / WEIGHTS).is_file():
        train_tokenizer(sources, size, options, out, device)
    facts = read_json(out / FACTS)
    for name, value in {"image_size": size, **asdict(options)}.items():
        if facts.get(name) != value:
            raise ValueError(
                f"the tokenizer in {out} was trained with {name} = {facts.get(name)!r}; this command has {value!r}. "
                "Use the old settings, or choose another --out."
            )


def train_tokenizer(
    sources: dict[str, Source], size: int, options: SmallVQOptions, out: str | Path, device: torch.device
) -> dict[str, Any]:
    """Train a small VQ on the training split and write it to a new directory, with its numbers and a picture.

    Returns what tokenizer.json holds: PSNR in dB on the validation split, sizes and settings.

    Raises:
        ValueError: `out` exists, sizes that cannot be, or no picture that can be read.
    """
    target = require_new(out, "tokenizer")
    spec = small_spec(options.downsample, options.codes, options.width)
    images, held_out = (squares(sources[split], size) for split in ("train", "validation"))
    print(f"training a VQ tokenizer on {len(images):,} pictures of {size} x {size} pixels", flush=True)
    with progress_bar(options.steps, "step") as advance:
        model = train_small_vq(images.to(device), spec, options.steps, options.seed, advance)
    model = model.cpu()
    restored = torch.cat([model.decode(model.encode(part)) for part in held_out.split(32)])  # (n, 3, S, S)
    used = torch.cat([model.encode(part).flatten() for part in images.split(32)]).unique()
    facts = {
        "psnr_db": round(psnr(held_out, restored), 2),
        "held_out_pictures": len(held_out),
        "training_pictures": len(images),
        "codes_in_use": len(used),
        "image_size": size,
        **asdict(options),
    }
    with new_directory(target, "tokenizer") as folder:
        save_checked(model.to_official(), folder / WEIGHTS)
        shown = torch.cat([torch.stack([a, b]) for a, b in zip(held_out[:SHOWN], restored[:SHOWN])])
        save_png(tile(shown, 4), folder / "reconstructions.png")
        write_json(folder / FACTS, facts)
    print(
        f"tokenizer: PSNR {facts['psnr_db']:.1f} dB on {len(held_out)} held-out pictures, {len(used)} of "
        f"{options.codes} codes in use; wrote {target}/: {WEIGHTS}, {FACTS}, reconstructions.png (each picture "
        "left, its reconstruction right)",
        flush=True,
    )
    return facts


def squares(source: Source, size: int) -> Tensor:
    """The centre squares (n, 3, S, S) uint8 of a source's pictures, at most `MOST_PICTURES`; unreadable ones missing.

    Raises:
        ValueError: none can be read.
    """
    crop: Callable[[bytes], np.ndarray] = SquareCrop(size)
    found, problem = [], ""
    for index in permutation(stream(0, 5), len(source))[:MOST_PICTURES].tolist():
        try:
            found.append(torch.from_numpy(crop(source.read(index)[0])))
        except Unreadable as error:
            problem = f"{source.where(index)}: {error}"
    if not found:
        raise ValueError(f"no picture to train or measure a tokenizer on can be read; {problem}.")
    return torch.stack(found)
