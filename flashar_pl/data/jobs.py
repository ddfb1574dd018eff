"""The jobs behind `flashar tokenize`: what is given, as a `Job` on a device.

Every `--help` imports this file: neither torch nor numpy at module level.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.options import CodecOptions, PackOptions, ShardOptions, check_least, parse_grid, parse_tokenizer

if TYPE_CHECKING:
    import torch

    from flashar_pl.data.tokenise import Job
    from flashar_pl.tokenizers import Tokenizer

IMAGENET_CLASSES = 1000
LISTS = (".json", ".jsonl")
"""Ends of lists of captions and images."""
PUBLISHED_CODES = 131072
CENTRE_OF_TEN = 4
"""Number of the centre crop in `ten_crop`'s order; torchvision and LlamaGen have the same."""


@dataclass(frozen=True)
class ClassImageOptions:
    """Images"""

    images: str
    """Folder with one sub-folder of images a class, or tars (jpg + cls): a folder of them, a tar, or a pattern."""
    image_size: int = 256
    """Side of a tokenised crop in pixels."""
    ten_crop: bool = False
    """Store ten crops of each image (four corners, centre, and the same of its mirror image); without it, the centre
    crop and its mirror image. Evaluation takes the centre crop."""
    crop_range: float | None = None
    """With --ten-crop, the image's shorter side before cropping, in crop sides. Default: 1.1."""
    classes: str | None = None
    """File of class names, one a line, in the order of their ids. Default: the folders sorted by name, or the ids in
    the tars."""
    num_classes: int | None = None
    """For tars of class ids, their number. Default: 1000."""

    def __post_init__(self) -> None:
        if self.crop_range is not None and not self.ten_crop:
            raise ValueError("--crop-range has a meaning only with --ten-crop; add it, or leave --crop-range out.")
        check_least(self, crop_range=1)

    def side(self, downsample: int) -> int:
        """The side an image is resized to before it is cropped. Raises ValueError unless it is made of whole codes."""
        if self.image_size < 1 or self.image_size % downsample:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of {downsample} (pixels of a code)."
            )
        # As in LlamaGen, the product is truncated: 256 x 1.1 gives 281.
        return int(self.image_size * (self.crop_range or 1.1)) if self.ten_crop else self.image_size


@dataclass(frozen=True)
class PictureOptions:
    """Pictures"""

    folder: str
    """Folder of pictures: a sub-folder for each class, or none; below FOLDER/train and FOLDER/val the same, if they are
    split already."""
    image_size: int | None = None
    """Side of the centre square in pixels. Default: 64; with --weights 256, or what they were trained on here; with
    pixels:LEVELS 16."""
    one_class: bool = False
    """Sub-folders are no classes."""
    no_mirror: bool = False
    """Do not store mirror images, which training takes as often as the pictures themselves."""

    def __post_init__(self) -> None:
        check_least(self, image_size=1)


@dataclass(frozen=True)
class SmallVQOptions:
    """Tokenizer to train"""

    downsample: int = 8
    """Pixels of a code along each side: 2, 4, 8 or 16."""
    codes: int = 512
    """Number of codes."""
    width: int = 32
    """Channels at full resolution, a multiple of 32; the published VQ-16 has 128."""
    steps: int = 1000
    """Training steps, of 16 parts of pictures each."""
    seed: int = 0
    """Of its first weights and of the parts."""

    def __post_init__(self) -> None:
        check_least(self, steps=2)


@dataclass(frozen=True)
class PicturePackOptions(PackOptions):
    """Shards"""

    max_bad_share: float = 0.5
    """With skip, abort if it is a larger share of a split."""


@dataclass(frozen=True)
class CaptionedOptions:
    """Captioned images"""

    data: str
    """.json list, .jsonl file, or tars: a folder of them, a tar, or a pattern. Several, with commas between, become a
    data set each, in OUT/NAME after the folders of the lists: a mixture to train on."""
    validation: int = 0
    """Of each list, so many pairs become the validation split, drawn by their captions: equal ones are in one split."""
    crop: Literal["aspect", "square"] = "aspect"
    """The largest part with the nearest of nine ratios (aspect), or one square of --image-size for all (square)."""
    images: str | None = None
    """Folder that the paths of a list start from. Default: that of the list."""
    image_size: int | None = None
    """Side in pixels of a square image; other ratios have about as many codes, never more. Default: 512."""
    buckets: str | None = None
    """Grids to sort images into, such as 32x32,27x36,36x27 (HEIGHTxWIDTH in codes); one grid crops every image to it.
    Default: nine, from 1:2 to 2:1."""
    caption_key: str | None = None
    """Field of a list that holds the caption, if it is none of input_prompt, caption, prompt, text."""
    image_key: str | None = None
    """Field of a list that holds the image's path, if it is none of output_image, image, image_path, file_name."""
    vocabulary: int | None = None
    """For tars of codes without weights, number of codes. Default: 131072."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.buckets is not None:
            raise ValueError("give --image-size or --buckets, not both: grids say the size already.")
        if self.crop == "square" and self.buckets is not None:
            raise ValueError("give --crop square or --buckets, not both: grids say the shape already.")
        check_least(self, validation=0)

    def places(self, out: str) -> dict[str, str]:
        """Directory of the shards -> what goes there. Raises ValueError for two of one name."""
        given = [part for each in self.data.split(",") if (part := each.strip())]
        if len(given) < 2:
            return {out: self.data}
        names = [Path(place).expanduser().absolute() for place in given]
        ends = [path.parent.name if path.suffix in LISTS else path.name for path in names]
        if len(set(ends)) < len(ends):
            raise ValueError(f"--data: the data sets would be called {', '.join(ends)}; expected different folders.")
        return {str(Path(out) / end): place for end, place in zip(ends, given, strict=True)}


@dataclass(frozen=True)
class NpyOptions:
    """Codes"""

    codes: str
    """Folder of the code files."""
    labels: str
    """Folder of the label files."""
    vocabulary: int = 16384
    """Number of codes of the tokenizer that made them."""
    grid: str | None = None
    """HEIGHTxWIDTH. Default: a square."""
    num_classes: int = IMAGENET_CLASSES
    """Number of classes."""


def imagenet_job(images: ClassImageOptions, codec: CodecOptions, shards: ShardOptions, device: torch.device) -> Job:
    """Class-conditional images through a tokenizer."""
    from flashar_pl.data.encode import ImageEncoder, weights_hash
    from flashar_pl.data.images import SquareCrop
    from flashar_pl.data.sources import class_images
    from flashar_pl.data.tokenise import Job, known_classes

    model = open_tokenizer(codec, "vq16", device)
    side = images.side(model.downsample)
    crops = 10 if images.ten_crop else 2
    cells = images.image_size // model.downsample
    return Job(
        shards,
        class_images(images.images, images.classes, images.num_classes, IMAGENET_CLASSES, known_classes(shards.out)),
        SquareCrop(side),
        encode=ImageEncoder(model, device, crops, images.image_size),
        name="imagenet",
        tokenizer=model.config(),
        vocabulary=model.vocabulary,
        batch=max(1, (codec.batch_size or 32) // crops),
        settings={"image_size": images.image_size, "resized_to": side, "weights_hash": weights_hash(model)},
        crops=crops,
        grid=(cells, cells),
        evaluation_crop=CENTRE_OF_TEN if images.ten_crop else 0,
    )


def npy_job(files: NpyOptions, codec: CodecOptions, shards: ShardOptions, device: torch.device) -> Job:
    """LlamaGen's files of codes as they are; the weights, if given, must have as many codes."""
    from flashar_pl.data.code_files import NpyCodes, NpyFolders
    from flashar_pl.data.tokenise import Job

    source = NpyFolders(files.codes, files.labels, files.num_classes)
    crops, grid = source.layout(parse_grid(files.grid))
    config = tokenizer_config(codec, "vq16")
    if codec.weights is not None:  # the file is given: its facts win over what was typed
        model = open_tokenizer(codec, "vq16", device)
        config = model.config()
        if model.vocabulary != files.vocabulary:
            raise ValueError(
                f"vocabulary is {files.vocabulary}, but {codec.weights} has {model.vocabulary} codes; they must agree."
            )
    return Job(
        shards,
        source,
        NpyCodes(crops, grid, files.vocabulary),
        name="imagenet",
        tokenizer=config,
        vocabulary=files.vocabulary,
        batch=shards.block,
        settings={"folders": [files.codes, files.labels]},
        crops=crops,
        grid=grid,
        evaluation_crop=CENTRE_OF_TEN if crops == 10 else 0,
    )


def captioned_job(images: CaptionedOptions, codec: CodecOptions, shards: ShardOptions, device: torch.device) -> Job:
    """Images with captions through a tokenizer, or tars of ready codes with captions."""
    from flashar_pl.checkpoints.hub import preview_of
    from flashar_pl.data.captions import captioned_images, cut_validation
    from flashar_pl.data.encode import ImageEncoder, weights_hash
    from flashar_pl.data.images import BucketCrop, default_grids
    from flashar_pl.data.tokenise import Job

    if Path(images.data).suffix not in LISTS and _holds_codes(images.data):
        return _captioned_codes_job(images, codec, shards, device)
    if images.vocabulary is not None:
        raise ValueError("--vocabulary is for tars of codes; for images it is the tokenizer's.")
    source = captioned_images(images.data, images.images, images.caption_key, images.image_key)
    if images.validation:
        source = cut_validation(source, images.validation)[shards.split]
    chosen = [] if images.buckets is None else [parse_grid(text) for text in images.buckets.split(",")]
    model = open_tokenizer(codec, "ibq", device)
    grids = tuple(grid for grid in chosen if grid) or default_grids(images.image_size or 512, model.downsample)
    if images.crop == "square":
        grids = (((images.image_size or 512) // model.downsample,) * 2,)
    encoder = ImageEncoder(model, device)
    if model.config()["kind"] == "hub":
        encoder.preview = preview_of(model.config()["weights"])
    return Job(
        shards,
        source,
        BucketCrop(grids, model.downsample),
        encode=encoder,
        previews=encoder.previews,
        name=Path(shards.out).name,
        tokenizer=model.config(),
        vocabulary=model.vocabulary,
        batch=codec.batch_size or 8,
        settings={"weights_hash": weights_hash(model), "grids": grids},
    )


def _captioned_codes_job(
    images: CaptionedOptions, codec: CodecOptions, shards: ShardOptions, device: torch.device
) -> Job:
    from flashar_pl.data.code_files import PtCodes
    from flashar_pl.data.sources import TarSource
    from flashar_pl.data.tokenise import Job

    if images.image_size or images.buckets or images.crop == "square" or images.validation:
        raise ValueError(
            "--image-size, --buckets, --crop and --validation are for images; codes keep their grids and splits."
        )
    if codec.weights is None:
        config, vocabulary = tokenizer_config(codec, "ibq"), images.vocabulary or PUBLISHED_CODES
    elif images.vocabulary is not None:
        raise ValueError("give --weights or --vocabulary, not both: the weights say how many codes there are.")
    else:
        model = open_tokenizer(codec, "ibq", device)
        config, vocabulary = model.config(), model.vocabulary
    return Job(
        shards,
        TarSource(images.data, ("pt",), "txt"),
        PtCodes(vocabulary),
        name=Path(shards.out).name,
        tokenizer=config,
        vocabulary=vocabulary,
        batch=codec.batch_size or 8,
        settings={"vocabulary": vocabulary},
    )


def _holds_codes(location: str) -> bool:
    """Whether the first record of some tars has a .pt member. Raises ValueError as `find_tars` does."""
    from flashar_pl.data.tars import find_tars, tar_records

    _, members = next(tar_records(find_tars(location)[0]), ("", {}))
    return "pt" in members


def tokenizer_config(codec: CodecOptions, usual: str) -> dict[str, Any]:
    """The argument of `build_tokenizer`; `usual` is the kind unless another is typed."""
    typed = codec.tokenizer or usual
    if codec.weights is not None:
        return {"kind": typed, "weights": codec.weights}
    return (parse_tokenizer(typed) if ":" in typed else None) or {"kind": typed}


def open_tokenizer(codec: CodecOptions, usual: str, device: torch.device) -> Tokenizer:
    """The tokenizer on a device. Raises ValueError."""
    from flashar_pl.tokenizers import build_tokenizer

    return build_tokenizer(tokenizer_config(codec, usual)).to(device)
