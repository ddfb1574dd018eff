"""`flashar tokenize imagenet` and `flashar tokenize npy`: class-conditional images and codes as shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.options import parse_grid, parse_tokenizer

if TYPE_CHECKING:
    from flashar_pl.data.sources import Source
    from flashar_pl.data.tokenise import Job
    from flashar_pl.tokenizers import Tokenizer

Split = Literal["train", "validation", "test"]
IMAGENET_CLASSES = 1000


def tokenize_imagenet(
    *,
    images: str,
    out: str,
    tokenizer: str = "vq16",
    weights: str | None = None,
    image_size: int = 256,
    ten_crop: bool = False,
    crop_range: float | None = None,
    split: Split = "train",
    classes: str | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    workers: int = 4,
    device: str = "auto",
    max_bad_share: float = 0.01,
    block: int = 100,
    shard_images: int = 2000,
    keep_order: bool = False,
) -> dict[str, Any] | None:
    """Turn an image folder or WebDataset tars (jpg + cls) into shards of codes, with their manifest.

    Works in any number of processes, one for each GPU under torchrun; the result does not depend on their number. A
    killed run continues where it stopped when the same command is given again. Run it twice with the same --out for
    two splits.

    Example:
        flashar tokenize imagenet --images imagenet/train --out data/imagenet_256 --weights vq_ds16_c2i.pt --ten-crop
        torchrun --nproc-per-node 8 -m flashar_pl.cli tokenize imagenet --images "tars/train-*.tar" --image-size 384
        --out data/imagenet_384 --weights vq_ds16_c2i.pt --ten-crop --crop-range 1.1

    Args:
        images: folder with one sub-folder of images for each class, or tars: a folder of them, a tar, or a pattern.
        out: directory of the shards, made if needed.
        tokenizer: kind of tokenizer (vq16, vq8, ibq), or KIND:FILE.
        weights: weights file of the tokenizer.
        image_size: side of a tokenised crop in pixels.
        ten_crop: store ten crops of each image (four corners, centre, and the same of its mirror image); without
            it, the centre crop and its mirror image. Evaluation takes the centre crop.
        crop_range: with --ten-crop, the image's shorter side before cropping, in crop sides; 1.1 if not given.
        split: which split to write.
        classes: file of class names, one a line, in the order of their ids; otherwise the folders sorted by name, or
            the ids in the tars.
        num_classes: for tars of class ids, their number; 1000 if not given.
        batch_size: crops of one pass through the tokenizer.
        workers: processes that decode images, for each device.
        device: auto, cpu, cuda or cuda:N.
        max_bad_share: abort if a larger share of the images cannot be read.
        block: images of a record, the unit training shuffles.
        shard_images: images of a shard; a killed run loses at most the shard each process was at.
        keep_order: keep the order of the tars, if they are shuffled already; otherwise images are shuffled.
    """
    from flashar_pl.data.encode import CENTRE_OF_TEN, CROPS, ImageEncoder, weights_hash
    from flashar_pl.data.images import SquareCrop
    from flashar_pl.data.tokenise import Job

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more crops.")
    rank, ranks = ranks_from_environment()
    model, place = open_tokenizer(tokenizer, weights, device)
    side = side_before_crops(image_size, ten_crop, crop_range, model.downsample)
    source = class_images(images, classes, num_classes)
    crops: Literal["ten", "mirror"] = "ten" if ten_crop else "mirror"
    job = Job(
        source=source,
        prepare=SquareCrop(side),
        encode=ImageEncoder(model, place, crops, image_size),
        out=Path(out),
        name="imagenet",
        split=split,
        tokenizer=model.config(),
        vocabulary=model.vocabulary,
        crops=CROPS[crops],
        evaluation_crop=CENTRE_OF_TEN if ten_crop else 0,
        batch=max(1, batch_size // CROPS[crops]),
        settings={"image_size": image_size, "resized_to": side, "weights_hash": weights_hash(model)},
        grid=(image_size // model.downsample, image_size // model.downsample),
        block=block,
        part=shard_images,
        shuffle=not keep_order,
        workers=workers,
        max_bad_share=max_bad_share,
        rank=rank,
        ranks=ranks,
    )
    return run_job(job)


def tokenize_npy(
    *,
    codes: str,
    labels: str,
    out: str,
    tokenizer: str = "vq16",
    weights: str | None = None,
    vocabulary: int = 16384,
    grid: str | None = None,
    num_classes: int = 1000,
    split: Split = "train",
    workers: int = 4,
    max_bad_share: float = 0.01,
    block: int = 100,
    shard_images: int = 2000,
    keep_order: bool = False,
) -> dict[str, Any] | None:
    """Turn the .npy code files of LlamaGen's extract_codes_c2i.py into shards.

    One file for each image, i.npy with int64 codes (1, crops, codes), and one for each label. Restarts and works in
    several processes as `flashar tokenize imagenet` does.

    Example:
        flashar tokenize npy --codes imagenet256_codes --labels imagenet256_labels --out data/imagenet_256
          --weights vq_ds16_c2i.pt

    Args:
        codes: folder of the code files.
        labels: folder of the label files.
        out: directory of the shards, made if needed.
        tokenizer: kind of the tokenizer that made the codes, noted in the manifest.
        weights: its weights file, noted in the manifest; generation and checks decode with it.
        vocabulary: number of codes of that tokenizer.
        grid: HEIGHTxWIDTH; a square if not given.
        num_classes: number of classes.
        split: which split to write.
        workers: processes that read files.
        max_bad_share: abort if a larger share of the files cannot be read or holds codes outside the vocabulary.
        block: images of a record, the unit training shuffles.
        shard_images: images of a shard.
        keep_order: keep the order of the numbers; otherwise images are shuffled.
    """
    from flashar_pl.data.code_files import NpyCodes, NpyFolders
    from flashar_pl.data.encode import CENTRE_OF_TEN, CROPS, codes_as_they_are
    from flashar_pl.data.tokenise import Job

    rank, ranks = ranks_from_environment()
    source = NpyFolders(codes, labels, num_classes)
    crops, size = source.layout(parse_grid(grid))
    config = tokenizer_config(tokenizer, weights)
    if weights is not None:  # the file is given: its facts win over what was typed
        model, _ = open_tokenizer(tokenizer, weights, "cpu")
        config = model.config()
        if model.vocabulary != vocabulary:
            raise ValueError(
                f"vocabulary is {vocabulary}, but {weights} has {model.vocabulary} codes; they must agree."
            )
    job = Job(
        source=source,
        prepare=NpyCodes(crops, size, vocabulary),
        encode=codes_as_they_are,
        out=Path(out),
        name="imagenet",
        split=split,
        tokenizer=config,
        vocabulary=vocabulary,
        crops=crops,
        evaluation_crop=CENTRE_OF_TEN if crops == CROPS["ten"] else 0,
        batch=block,
        settings={"folders": [codes, labels]},
        grid=size,
        block=block,
        part=shard_images,
        shuffle=not keep_order,
        workers=workers,
        max_bad_share=max_bad_share,
        rank=rank,
        ranks=ranks,
    )
    return run_job(job)


def side_before_crops(image_size: int, ten_crop: bool, crop_range: float | None, downsample: int) -> int:
    """The side an image is resized to before it is cropped. Raises ValueError for sizes that do not go together."""
    if crop_range is not None and not ten_crop:
        raise ValueError("--crop-range has a meaning only with --ten-crop; add it, or leave --crop-range out.")
    crop_range = 1.1 if crop_range is None else crop_range
    if crop_range < 1:
        raise ValueError(f"crop_range is {crop_range}; expected 1 or more.")
    if image_size < 1 or image_size % downsample:
        raise ValueError(f"image_size is {image_size}; expected a multiple of {downsample} (pixels of a code).")
    # As in LlamaGen, the product is truncated: 256 x 1.1 gives 281.
    return int(image_size * crop_range) if ten_crop else image_size


def class_images(images: str, classes: str | None, num_classes: int | None) -> Source:
    """An image folder if `images` is a folder with sub-folders, else tars."""
    from flashar_pl.data.sources import IMAGE_MEMBERS, ImageFolder, TarSource, read_classes

    names = read_classes(classes)
    folder = Path(images)
    if folder.is_dir():
        has_tars, has_folders = any(folder.glob("*.tar")), any(entry.is_dir() for entry in folder.iterdir())
        if has_tars and has_folders:
            raise ValueError(
                f"{images} holds both tars and folders; give the tars as a pattern such as {images}/*.tar."
            )
        if not has_tars:
            if num_classes is not None:
                raise ValueError(
                    "--num-classes is for tars; the classes of a folder are its sub-folders, or --classes."
                )
            return ImageFolder(images, names)
    if names is not None and num_classes is not None:
        raise ValueError("give --classes or --num-classes, not both.")
    return TarSource(images, IMAGE_MEMBERS, "cls", names, num_classes or IMAGENET_CLASSES)


def tokenizer_config(tokenizer: str | dict[str, Any], weights: str | None) -> dict[str, Any]:
    """The argument of `build_tokenizer`, from --tokenizer and --weights."""
    if weights is not None:
        return {"kind": tokenizer, "weights": weights}
    if isinstance(tokenizer, str) and ":" not in tokenizer:
        return {"kind": tokenizer}
    config = parse_tokenizer(tokenizer)
    assert config is not None
    return config


def open_tokenizer(tokenizer: str, weights: str | None, device: str) -> tuple[Tokenizer, Any]:
    """The tokenizer and its device; auto and cuda under torchrun = this process's GPU. Raises ValueError."""
    import torch

    from flashar_pl.devices import find_device
    from flashar_pl.tokenizers import build_tokenizer

    place = find_device(device)
    if device in ("auto", "cuda") and place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return build_tokenizer(tokenizer_config(tokenizer, weights)).to(place), place


def ranks_from_environment() -> tuple[int, int]:
    """(number of this process, number of processes) as torchrun sets them. Raises ValueError for anything else."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdigit():
            raise ValueError(f"{name} is {text!r}; expected a whole number, as torchrun sets it.")
        values.append(int(text))
    return values[0], values[1]


def run_job(job: Job) -> dict[str, Any] | None:
    """Run a job with a progress bar on the first process, and print what came out."""
    import sys

    from tqdm import tqdm

    from flashar_pl.data.tokenise import run

    bars: list[Any] = []

    def progress(total: int, done: int) -> Any:
        if job.rank == 0:
            share = f"{job.split}, process 1 of {job.ranks}" if job.ranks > 1 else job.split
            pace = 0.5 if sys.stderr.isatty() else 30.0
            bars.append(tqdm(total=total, initial=done, unit=" images", desc=share, mininterval=pace))
            return bars[0].update
        return lambda n: None

    job.progress = progress
    try:
        report = run(job)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # of these only the first process is heard otherwise
            print(f"process {job.rank + 1} of {job.ranks}: {error}", file=sys.stderr)
        raise
    finally:
        for bar in bars:
            bar.close()
    if report is None:
        print(f"process {job.rank + 1} of {job.ranks} has finished its shards; the last process writes the manifest")
        print(f"(if all have ended and {job.out} has no manifest.json, give the same command again)")
        return None
    grids = ", ".join(f"{count:,} of {grid} codes" for grid, count in report["grids"].items())
    print(f"{job.split}: {report['written']:,} of {report['samples']:,} images are in the shards ({grids})")
    for reason, count in report["left_out"].items():
        print(f"left out: {count:,} ({reason})")
    if report["unreadable"]:
        print(f"unreadable: {report['unreadable']:,}, listed in {job.out}/bad_images.{job.split}.txt")
    print(f"shards at {job.out}; check them with: flashar tokenize check {job.out} --out check.png")
    return report
