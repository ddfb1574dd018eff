"""`flashar tokenize`: data sets as shards of codes, and their check."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.data.jobs import (
    CaptionedOptions,
    ClassImageOptions,
    NpyOptions,
    PictureOptions,
    PicturePackOptions,
    SmallVQOptions,
    captioned_job,
    imagenet_job,
    npy_job,
)
from flashar_pl.files import require_new
from flashar_pl.options import (
    CodecOptions,
    CodeOptions,
    ModelOptions,
    PlaceOptions,
    RankOptions,
    SampleOptions,
    SamplingSettings,
    ShapeOptions,
    ShardOptions,
    SplitOptions,
    TextOptions,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def tokenize_digits(*, out: str = "data/digits", seed: int = 0) -> Any:
    """Write the embedded digits as WebDataset shards of codes, with their manifest.

    scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 17 grey levels used directly as codes, 10 classes: 1,400
    images to train on, 100 to validate, 297 to test. Needs no download.

    Example:
        flashar tokenize digits --out data/digits

    Args:
        out: directory to make; it must not exist.
        seed: of the division into splits.
    """
    from flashar_pl.data import digits

    return _announce(digits.tokenize_digits(str(Path(out).expanduser()), seed), out)


def tokenize_moving_digits(*, out: str = "data/moving_digits", seed: int = 0) -> Any:
    """Write videos of the embedded digits as WebDataset shards of codes, with their manifest.

    Every digit moves to the right, down, to the left and up: 4 frames of 6 x 6 pixels, one below the other, 40 classes
    (digit and direction); 5,600 videos to train on, 400 to validate, 1,188 to test. Needs no download.

    Example:
        flashar tokenize moving-digits --out data/moving_digits

    Args:
        out: directory to make; it must not exist.
        seed: of the division into splits, and of where the digits begin.
    """
    from flashar_pl.data import moving_digits

    return _announce(moving_digits.tokenize_moving_digits(str(Path(out).expanduser()), seed), out)


def tokenize_scenes(*, out: str = "data/scenes", seed: int = 0) -> Any:
    """Write the embedded scenes, text to image, as WebDataset shards of codes, with their manifest.

    One to four drawn objects on 8 x 8 patches, and prompts of GenEval's six tasks, such as "a red circle and a blue
    square": 40,000 scenes to train on, 600 to validate, 1,200 to test. 73 codes, exact in both directions; a prompt is
    five rows of one-hot text features. Needs no download. `flashar evaluate scenes` says what an image shows.

    Example:
        flashar tokenize scenes --out data/scenes

    Args:
        out: directory to make; it must not exist.
        seed: of all scenes.
    """
    from flashar_pl.data import scenes

    return _announce(scenes.tokenize_scenes(str(Path(out).expanduser()), seed), out)


def _announce(manifest: Any, out: str) -> Any:
    """Print what an embedded data set became."""
    counts = ", ".join(f"{manifest.samples(split):,} {split}" for split in manifest.splits)
    print(f"{manifest.name}: {counts} images, {manifest.grid[0]} x {manifest.grid[1]} codes of {manifest.vocabulary}")
    print(f"wrote {out}/manifest.json and its shards")
    return manifest


def tokenize_imagenet(
    images: ClassImageOptions,
    shards: ShardOptions,
    codec: CodecOptions = CodecOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Turn an image folder or WebDataset tars (jpg + cls) into shards of codes, with their manifest.

    Every device makes its share of the shards; the result does not depend on how many there are. A killed run
    continues where it stopped when the same command is given again, on other devices too.

    Example:
        flashar tokenize imagenet --images imagenet/train --out data/imagenet_256 --weights vq_ds16_c2i.pt --ten-crop
        flashar tokenize imagenet --images "tars/train-*.tar" --image-size 384 --devices 8 --out data/imagenet_384
          --weights vq_ds16_c2i.pt --ten-crop --crop-range 1.1
    """
    return _tokenise(partial(imagenet_job, images, codec, shards), shards, codec.device, ranks)


def tokenize_images(
    pictures: PictureOptions,
    /,
    shards: PicturePackOptions,
    codec: CodecOptions = CodecOptions(),
    trained: SmallVQOptions = SmallVQOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Turn a folder of your own pictures, of any sizes and modes, into shards of codes, with their manifest.

    Writes all three splits: FOLDER/train, FOLDER/val and FOLDER/test as they are, otherwise 90, 5 and 5 % by content,
    so that equal files are never in two splits. Of every picture the centre square is taken, upright as its EXIF tag
    says, with transparency on white; it and its mirror image are stored. Without --weights or --tokenizer a small VQ
    tokenizer is trained on the training split first and kept in OUT/tokenizer (`flashar tokenizer train` has the same
    options). A killed run continues when the same command is given again.

    Example:
        flashar tokenize images photos --out data/mine
        flashar tokenize images icons --out data/icons --tokenizer pixels:16 --image-size 16
        flashar tokenize images photos --out data/photos_256 --weights vq_ds16_c2i.pt
    """
    from flashar_pl.data.own_pictures import tokenise_pictures
    from flashar_pl.data.shards import Manifest
    from flashar_pl.ranks import run_on_ranks

    reports = run_on_ranks(partial(tokenise_pictures, pictures, codec, trained, shards), ranks, codec.device)
    if reports is None:
        return None
    for split, report in reports.items():
        _tell(report, split, shards.out)
    print(reports["train"]["account"])
    manifest = Manifest.load(shards.out)
    names, classes = manifest.class_names, manifest.condition.num_classes
    print(f"{classes} classes: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    place = shlex.quote(str(shards.out))
    print(f"shards at {shards.out}; look at them: flashar tokenize check {place} --out check.png")
    print(f"train on them: flashar fit --config experiments/own_images.yaml --data.shards {place}")
    return reports


def tokenize_npy(
    codes: NpyOptions,
    shards: ShardOptions,
    codec: CodecOptions = CodecOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Turn the .npy code files of LlamaGen's extract_codes_c2i.py into shards.

    One file for each image, i.npy with int64 codes (1, crops, codes), and one for each label. The tokenizer and its
    weights are noted in the manifest; generation and checks decode with them. Restarts and works on several devices as
    `flashar tokenize imagenet` does.

    Example:
        flashar tokenize npy --codes imagenet256_codes --labels imagenet256_labels --out data/imagenet_256
          --weights vq_ds16_c2i.pt
    """
    return _tokenise(partial(npy_job, codes, codec, shards), shards, codec.device, ranks)


def tokenize_samples(
    draw: SampleOptions,
    model: ModelOptions,
    shards: SplitOptions,
    sampling: SamplingSettings = SamplingSettings(),
    shape: ShapeOptions = ShapeOptions(),
    text: TextOptions = TextOptions(),
    engine: CodeOptions = CodeOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Draw samples of a model and write their codes as shards: post-training it where no images are at hand.

    --num-images samples of each class or prompt, mixed; sample i has seed + i. The shards hold what they were drawn
    for, so a model of text features needs --prompts and --text-encoder. Restarts and works on several devices as
    `flashar tokenize imagenet` does. What it costs in quality: docs/results/beyond.md.

    Example:
        flashar tokenize samples --checkpoint c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --classes 0-999
          --num-images 50 --cfg-scale 1.5 --out data/drawn
        flashar tokenize samples --checkpoint deepseek-community/Janus-Pro-1B --prompts prompts.txt --out data/drawn
    """
    from flashar_pl.checkpoints.repositories import located
    from flashar_pl.data.drawn import drawn_job
    from flashar_pl.evaluate.identity import path_digest
    from flashar_pl.evaluate.options import BATCH_SIZE, batch_size

    model = located(model)  # once, before there are ranks
    engine = replace(engine, batch_size=batch_size(engine, BATCH_SIZE, shards.shard_images))
    digest = path_digest(model.checkpoint) if Path(model.checkpoint).exists() else ""  # opening it says what is wrong
    build = partial(drawn_job, draw, model, sampling, shape, text, engine, shards, digest)
    return _tokenise(build, shards, engine.device, ranks)


def tokenize_text_image(
    images: CaptionedOptions,
    shards: ShardOptions,
    codec: CodecOptions = CodecOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Turn images with captions into shards of codes, one data set for each grid: OUT/32x32, OUT/27x36, ...; with
    several --data, OUT/NAME/32x32, ... for each of them.

    Reads a JSON list or JSONL of captions and image paths (ShareGPT-4o-Image: input_prompt, output_image), WebDataset
    tars of jpg + txt, or tars of ready codes, pt + txt, as the authors' Emu3.5 FlashAR training makes them. An image
    goes to the grid nearest to its aspect ratio: its largest centred part of that ratio, resized bicubically. Items
    of a list that edit an input image are left out. Restarts and works on several devices as `flashar tokenize
    imagenet` does.

    Example:
        flashar tokenize text-image --data OpenGPT-4o-Image/gen.json,ShareGPT-4o-Image/text_to_image.json --crop square
          --validation 500 --out data/text_image --weights Emu3.5-VisionTokenizer
        flashar tokenize text-image --data text_to_image.json --out data/sharegpt --weights Emu3.5-VisionTokenizer
        flashar tokenize text-image --data "laion/{00000..00127}.tar" --out data/laion --weights DIR --image-size 256
    """
    if images.validation and shards.split != "train":
        raise ValueError("--validation cuts a list into train and validation; leave out --split.")
    reports: dict[str, dict[str, dict[str, Any]]] = {}
    for out, data in images.places(shards.out).items():
        for split in ("train", "validation") if images.validation else (shards.split,):
            part = replace(shards, out=out, split=split)
            report = _tokenise(
                partial(captioned_job, replace(images, data=data), codec, part), part, codec.device, ranks
            )
            if report is not None:
                _show_captions(report, part)
                reports.setdefault(out, {})[split] = report
    if len(reports) == 1 and not images.validation:
        return reports[shards.out][shards.split]
    for out, splits in reports.items():
        counts = ", ".join(f"{report['written']:,} {split}" for split, report in splits.items())
        print(f"{out}: {counts} pairs")
    if len(reports) > 1 and shards.split == "train":
        weights = ", ".join(f"{out}: {splits['train']['written']}" for out, splits in reports.items())
        print(f"train on all, every pair as often as any other: --data.shards '{{{weights}}}'")
    return reports or None


def _show_captions(report: dict[str, Any], shards: ShardOptions) -> None:
    """What a person should know of the captions of each grid."""
    from flashar_pl.data.check import caption_report
    from flashar_pl.data.shards import Manifest, ShardReader

    for grid in report["grids"]:
        if (manifest := Manifest.load(Path(shards.out) / grid)).samples(shards.split):
            print("\n  ".join([f"{grid}:", *caption_report(ShardReader(manifest, shards.split))["lines"]]))


def _tell(report: dict[str, Any], split: str, out: str) -> None:
    """What became of the images of a split."""
    grids = ", ".join(f"{count:,} of {grid} codes" for grid, count in report["grids"].items())
    print(f"{split}: {report['written']:,} of {report['samples']:,} images are in the shards ({grids})")
    if report["unreadable"]:
        print(f"unreadable: {report['unreadable']:,}, listed in {out}/bad_images.{split}.txt")


def _tokenise(
    build: Callable[..., Any], shards: SplitOptions, device: str, ranks: RankOptions
) -> dict[str, Any] | None:
    """Run a job on every rank; the first one prints what came out."""
    from flashar_pl.data.tokenise import tokenise
    from flashar_pl.ranks import run_on_ranks

    report = run_on_ranks(partial(tokenise, build), ranks, device)
    if report is None:
        return None
    _tell(report, shards.split, shards.out)
    print(report["account"])
    place = shlex.quote(str(shards.out))
    print(f"shards at {shards.out}; check them with: flashar tokenize check {place} --out check.png")
    return report


def tokenize_check(
    shards: str,
    /,
    place: PlaceOptions = PlaceOptions(),
    *,
    decode: int | None = None,
    out: str | None = None,
    weights: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Check shards against their manifest; exit code 2 and a list of what is wrong if anything is.

    Reads every byte: hashes, members, shapes, code and label ranges, ids unique within a split. Prints a summary of
    labels or captions and of the codes in use. With --out, draws random samples decoded to pixels: the surest test
    of a tokenizer that does not belong to the codes.

    Example:
        flashar tokenize check data/imagenet256 --decode 32 --out check.png

    Args:
        shards: directory of the shards, or one with a sub-directory for each grid.
        decode: samples to draw; 16 if only --out is given.
        out: PNG of the drawn samples; with several grids, their names are added to it.
        weights: weights file of the tokenizer, if it is not where the manifest says.
        seed: of the draw.
    """
    from flashar_pl.data import check
    from flashar_pl.data.encode import check_weights, tokenizer_of, weights_hash
    from flashar_pl.data.shards import Manifest, verify
    from flashar_pl.data.tokenise import manifests
    from flashar_pl.devices import find_device

    if decode is not None and out is None:
        raise ValueError("--decode draws samples into a PNG; add --out check.png.")
    if decode is not None and decode < 1:
        raise ValueError(f"decode is {decode}; expected 1 or more samples.")
    if out is not None:
        require_new(out, "picture")
    root = Path(shards).expanduser()
    found = [path.parent for path in manifests(root)] if root.is_dir() else []
    result: dict[str, Any] = {}
    folders: list[Any] = [*found] or [shards]  # none found: a URL, or `load` says what it looked for
    for folder in folders:
        manifest = Manifest.load(folder)
        tokenizer = None
        if out is not None or weights is not None:
            tokenizer = tokenizer_of(manifest, weights, "--weights").to(find_device(place.device))
            check_weights(root, weights_hash(tokenizer))
        verified = verify(folder)
        facts = {"samples": verified.samples, "shards": verified.shards, "bytes": verified.bytes}
        facts |= {split: check.split_facts(manifest, split, verified) for split in verified.samples}
        check.show(manifest, facts)
        if out is not None:
            assert tokenizer is not None
            name = Path(out) if len(found) < 2 else Path(out).with_stem(f"{Path(out).stem}-{Path(folder).name}")
            facts["picture"] = check.draw(manifest, tokenizer, decode or 16, name, seed)
        result[Path(folder).name] = facts
    print("everything is as the manifest says")
    return result
