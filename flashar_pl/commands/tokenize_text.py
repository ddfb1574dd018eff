"""`flashar tokenize text-image`: images with captions, or ready codes with captions, as shards by aspect ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.tokenize_images import (
    Split,
    open_tokenizer,
    ranks_from_environment,
    run_job,
    tokenizer_config,
)
from flashar_pl.options import parse_grid

if TYPE_CHECKING:
    from flashar_pl.data.sources import Source

EMU35_CODES = 131072


def tokenize_text_image(
    *,
    data: str,
    out: str,
    tokenizer: str = "ibq",
    weights: str | None = None,
    images: str | None = None,
    image_size: int | None = None,
    buckets: str | None = None,
    caption_key: str | None = None,
    image_key: str | None = None,
    vocabulary: int | None = None,
    split: Split = "train",
    batch_size: int = 8,
    workers: int = 4,
    device: str = "auto",
    max_bad_share: float = 0.01,
    block: int = 100,
    shard_images: int = 2000,
    keep_order: bool = False,
) -> dict[str, Any] | None:
    """Turn images with captions into shards of codes, one data set for each grid: OUT/32x32, OUT/27x36, ...

    Reads a JSON list or JSONL of captions and image paths (ShareGPT-4o-Image: input_prompt, output_image), WebDataset
    tars of jpg + txt, or tars of ready codes, pt + txt, as the authors' Emu3.5 FlashAR training makes them. An image
    goes to the grid nearest to its aspect ratio: its largest centred part of that ratio, resized bicubically. Items
    of a list that edit an input image are left out. Restarts and works in several processes as `flashar tokenize
    imagenet` does.

    Example:
        flashar tokenize text-image --data text_to_image.json --out data/sharegpt --weights Emu3.5-VisionTokenizer
        flashar tokenize text-image --data "laion/{00000..00127}.tar" --out data/laion --weights DIR --image-size 256

    Args:
        data: .json list, .jsonl file, or tars: a folder of them, a tar, or a pattern.
        out: directory of the data sets, made if needed.
        tokenizer: kind of tokenizer (ibq, vq16, vq8), or KIND:FILE.
        weights: weights file or directory of the tokenizer; not needed for tars of codes.
        images: folder that the paths of a list start from; that of the list if not given.
        image_size: side in pixels of a square image; other ratios have about as many codes, never more. 512 if
            not given.
        buckets: grids to sort images into, such as 32x32,27x36,36x27 (HEIGHTxWIDTH in codes); one grid crops every
            image to it. Without it and with --image-size: nine, from 1:2 to 2:1.
        caption_key: field of a list that holds the caption, if it is none of input_prompt, caption, prompt, text.
        image_key: field of a list that holds the image's path, if it is none of output_image, image, image_path,
            file_name.
        vocabulary: for tars of codes without weights, number of codes; 131072 if not given.
        split: which split to write.
        batch_size: images of one pass through the tokenizer.
        workers: processes that decode images, for each device.
        device: auto, cpu, cuda or cuda:N.
        max_bad_share: abort if a larger share of the images cannot be read.
        block: images of a record, the unit training shuffles.
        shard_images: images that are tokenised together into one shard for each grid.
        keep_order: keep the order of the list or tars, if it is random already; otherwise images are shuffled.
    """
    from flashar_pl.data.tokenise import Job

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more images.")
    rank, ranks = ranks_from_environment()
    source, way = choose(
        data, tokenizer, weights, device, vocabulary, (image_size, buckets), (images, caption_key, image_key)
    )
    job = Job(
        source=source,
        prepare=way.prepare,
        encode=way.encode,
        out=Path(out),
        name=Path(out).name,
        split=split,
        tokenizer=way.tokenizer,
        vocabulary=way.vocabulary,
        crops=1,
        batch=batch_size,
        settings=way.settings,
        block=block,
        part=shard_images,
        shuffle=not keep_order,
        workers=workers,
        max_bad_share=max_bad_share,
        rank=rank,
        ranks=ranks,
    )
    report = run_job(job)
    if report is not None:
        show_captions(job.out, split, list(report["grids"]))
    return report


@dataclass
class Way:
    """How bytes become codes."""

    prepare: Callable[[bytes], Any]
    encode: Callable[[Any], Any]
    tokenizer: dict[str, Any]
    vocabulary: int
    settings: dict[str, Any]


def choose(
    data: str,
    tokenizer: str,
    weights: str | None,
    device: str,
    vocabulary: int | None,
    sizes: tuple[int | None, str | None],
    fields: tuple[str | None, str | None, str | None],
) -> tuple[Source, Way]:
    """What `data` is, and how it becomes codes.

    sizes: --image-size and --buckets. fields: --images, --caption-key and --image-key. Raises ValueError for options
    that do not go with the data.
    """
    from flashar_pl.data.sources import IMAGE_MEMBERS, CaptionList, TarSource

    listed = Path(data).suffix in (".json", ".jsonl")
    image_size, buckets = sizes
    if not listed and any(fields):
        raise ValueError("--caption-key, --image-key and --images are for .json and .jsonl lists; leave them out.")
    if not listed and holds_codes(data):
        if image_size or buckets:
            raise ValueError("--image-size and --buckets are for images; codes keep the grids they have.")
        way = code_way(tokenizer, weights, vocabulary)
        return TarSource(data, ("pt",), "txt"), way
    if vocabulary is not None:
        raise ValueError("--vocabulary is for tars of codes; for images it is the tokenizer's.")
    way = image_way(tokenizer, weights, device, image_size, buckets)
    return CaptionList(data, *fields) if listed else TarSource(data, IMAGE_MEMBERS, "txt"), way


def image_way(tokenizer: str, weights: str | None, device: str, image_size: int | None, buckets: str | None) -> Way:
    """Images through a tokenizer. Raises ValueError for a bad grid or tokenizer, or both a size and grids."""
    from flashar_pl.data.encode import ImageEncoder, weights_hash
    from flashar_pl.data.images import BucketCrop, default_grids

    if image_size is not None and buckets is not None:
        raise ValueError("give --image-size or --buckets, not both: grids say the size already.")
    chosen = [] if buckets is None else [parse_grid(text) for text in buckets.split(",")]
    model, place = open_tokenizer(tokenizer, weights, device)
    grids = tuple(grid for grid in chosen if grid is not None) or default_grids(image_size or 512, model.downsample)
    return Way(
        BucketCrop(grids, model.downsample),
        ImageEncoder(model, place, "none"),
        model.config(),
        model.vocabulary,
        {"weights_hash": weights_hash(model), "grids": [list(grid) for grid in grids]},
    )


def code_way(tokenizer: str, weights: str | None, vocabulary: int | None) -> Way:
    """Codes as they are; the weights, if given, say the vocabulary. Raises ValueError if both are given."""
    from flashar_pl.data.code_files import PtCodes
    from flashar_pl.data.encode import codes_as_they_are

    if weights is None:
        codes = EMU35_CODES if vocabulary is None else vocabulary
        return Way(PtCodes(codes), codes_as_they_are, tokenizer_config(tokenizer, None), codes, {"vocabulary": codes})
    if vocabulary is not None:
        raise ValueError("give --weights or --vocabulary, not both: the weights say how many codes there are.")
    model, _ = open_tokenizer(tokenizer, weights, "cpu")
    codes = model.vocabulary
    return Way(PtCodes(codes), codes_as_they_are, model.config(), codes, {"vocabulary": codes})


def holds_codes(location: str) -> bool:
    """Whether the first record of some tars has a .pt member. Raises ValueError as `find_tars` does."""
    from flashar_pl.data.tars import find_tars, tar_records

    _, members = next(tar_records(find_tars(location)[0]), ("", {}))
    return "pt" in members


def show_captions(out: Path, split: str, grids: list[str]) -> None:
    """Print what the captions of each grid look like."""
    from flashar_pl.data.captions import caption_report
    from flashar_pl.data.shards import Manifest, ShardReader

    for grid in grids:
        report = caption_report(ShardReader(Manifest.load(out / grid), split))
        print(f"{grid}:")
        for line in report["lines"]:
            print(f"  {line}")
