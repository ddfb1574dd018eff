"""What the user asks for, prompts, classes or features, as conditions of a model; and the grid of an image's shape.

Shapes: N samples in all, H x W grid, T text positions, C text feature width.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashar_pl.console import closest
from flashar_pl.options import ShapeOptions, Subject, TextOptions, parse_classes, parse_grid
from flashar_pl.recipes import find_recipe
from flashar_pl.tensor_files import read_arrays, read_tensors
from flashar_pl.text_files import read_lines

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flashar_pl.backbones.condition import Condition, Prompts, TextFeatures
    from flashar_pl.checkpoints.opening import Source

ASPECT_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2", "21:9")
"""Names of image shapes, width : height."""
PUBLISHED = {"16:9": (47, 85), "9:16": (85, 47), "21:9": (41, 97)}
"""Code grids (H, W) of published prompts at the area of 1024 x 1024 pixels, where the area would allow a row more. The
other published ones follow from the area."""
FULL_SIZE, CODE = 1024, 16
"""Pixels."""
USUAL_SIZE = 512
"""Side in pixels of the square whose area a named aspect ratio has where no size is given."""


@dataclass(frozen=True)
class Wanted:
    """Conditions of N samples."""

    condition: Condition
    unconditional: Condition | None
    """For guidance; None = the model's own."""
    labels: list[str]
    """Part of a file name for each sample."""
    prompts: list[str] | None
    """The prompt of each sample; None where samples have none."""

    def __len__(self) -> int:
        return len(self.labels)


# --- grids -----------------------------------------------------------------------------------------------------------


def choose_grid(source: Source, shape: ShapeOptions) -> tuple[int, int]:
    """The grid (H, W) of the images: an aspect ratio at an area, or what the checkpoint (or --grid) says.

    Raises:
        ValueError: an unknown name, a shape and a grid, or no grid at all.
    """
    aspect_ratio, image_size = shape.aspect_ratio, shape.image_size
    if shape != ShapeOptions() and source.grid != source.description.grid:
        raise ValueError("--grid is given with --aspect-ratio or --image-size; give one of them.")
    if aspect_ratio is None and image_size is None:
        return source.need_grid()
    if aspect_ratio is not None and "x" in aspect_ratio.lower():
        if image_size is not None:
            raise ValueError(f"--aspect-ratio {aspect_ratio} is a grid in codes; leave out --image-size.")
        grid = parse_grid(aspect_ratio)
        assert grid is not None
        return grid
    backbone = source.model.backbone
    usual = math.isqrt(math.prod(backbone.usual_grid)) * backbone.code_pixels if backbone.many_grids else USUAL_SIZE
    return scaled_grid(aspect_ratio or "1:1", usual if image_size is None else image_size, backbone.code_pixels)


def scaled_grid(name: str, size: int, code: int = CODE) -> tuple[int, int]:
    """The grid (H, W) of an aspect ratio at the area of size x size pixels, never more, with codes of code x code;
    `flashar tokenize text-image` sorts images into the same ones. Raises ValueError."""
    if name not in ASPECT_RATIOS:
        known = ", ".join(ASPECT_RATIOS)
        raise ValueError(f"aspect ratio is {name!r}; expected one of {known}, or HEIGHTxWIDTH in codes such as 24x42.")
    from flashar_pl.grid import grid_of_ratio

    if size < code:
        raise ValueError(f"image size is {size} pixels; expected {code} or more.")
    if (size, code) == (FULL_SIZE, CODE) and name in PUBLISHED:
        return PUBLISHED[name]
    width, height = (int(side) for side in name.split(":"))
    return grid_of_ratio(width / height, (size // code) ** 2)


# --- conditions ------------------------------------------------------------------------------------------------------


def read_prompts(prompt: Sequence[str] | None, file: str | None) -> list[str] | None:
    """The prompts given, then those of a file, one a line without empty lines; None where neither is given."""
    if prompt is None and file is None:
        return None
    given = list(prompt or ())
    if file is not None:
        path = find_recipe(file)
        if not path.is_file():
            raise ValueError(f"no prompts at {file}; expected a text file with one prompt a line.")
        given += [line for _, line in read_lines(path)]
    if not given:
        raise ValueError(f"{file} has no prompts; expected one a line.")
    for number, text in enumerate(given, start=1):
        check_text(text, f"prompt {number}")
    return given


def check_text(text: str, what: str) -> None:
    """ValueError for text with a surrogate, as a wrong encoding of the command line or "\\ud800" in JSON leaves it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{what} is {ascii(text)[:80]}, which holds half a character; expected text of whole ones.")


def ask(
    source: Source,
    grid: tuple[int, int],
    num_images: int,
    guided: bool,
    subject: Subject,
    text: TextOptions = TextOptions(),
) -> Wanted:
    """Conditions of N = (prompts, classes or captions) x num_images samples.

    Raises:
        ValueError: none or several kinds are given, or they do not fit the model.
    """
    import torch

    prompts, classes = read_prompts(subject.prompt, subject.prompts), subject.classes
    kinds = {"--prompt or --prompts": prompts, "--classes": classes, "--text-features": subject.text_features}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"got {' and '.join(given) or 'nothing to draw'}; give one of {', '.join(kinds)}.")
    if prompts is None and text != TextOptions():
        raise ValueError("--negative-prompt, --assets and --text-encoder are for --prompt; leave them out.")
    if text.negative_prompt is not None:
        check_text(text.negative_prompt, "--negative-prompt")
        if not guided:
            raise ValueError("--negative-prompt acts through guidance; add --cfg-scale, such as 5.")
    condition: Condition | Tensor
    unconditional = None
    if prompts is not None:
        condition, unconditional = from_prompts(source, grid, prompts, guided, text)
        labels = [f"prompt{i}" for i in range(len(prompts))]
    elif source.model.backbone.conditioning.kind == "prompt":
        raise ValueError("this model takes prompts; give --prompt.")
    elif classes is not None:
        ids = class_ids(source, read_classes(classes))
        condition, labels = torch.tensor(ids), [f"class{i}" for i in ids]
    else:
        assert subject.text_features is not None
        condition = read_text_features(subject.text_features)
        labels = [f"text{i}" for i in range(len(condition))]
    condition = source.model.backbone.check_condition(condition)
    each = [i for i in range(len(labels)) for _ in range(num_images)]
    return Wanted(
        condition.rows(each),
        None if unconditional is None else unconditional.rows(each),
        [labels[i] for i in each],
        None if prompts is None else [prompts[i] for i in each],
    )


def check_seed(seed: int, n: int) -> None:
    """ValueError where seed .. seed + n - 1 are not all seeds."""
    if not -(2**63) <= seed <= 2**64 - n:
        raise ValueError(f"seed is {seed}; expected a whole number of 64 bits, as seed + {n - 1} too.")


def read_classes(classes: str | list[int]) -> str | list[int]:
    """The lines of a file NAME.txt joined by commas; anything else as it is."""
    if not isinstance(classes, str) or not classes.endswith(".txt"):
        return classes
    path = find_recipe(classes)
    if not path.is_file():
        raise ValueError(f"no classes at {classes}; expected a text file with one class a line.")
    return ",".join(line.strip() for _, line in read_lines(path))


def class_ids(source: Source, classes: str | list[int] | int) -> list[int]:
    """Ids of classes that are given by id, by range, or by the name that the training data had for them.

    Digits are an id, whatever the names.
    """
    names = {name: i for i, name in enumerate(source.description.class_names) if not name.isdigit()}
    if isinstance(classes, str) and classes.strip() in names:  # a name may hold commas
        return [names[classes.strip()]]
    if not isinstance(classes, str) or not names:
        return parse_classes(classes)
    parts = [part.strip() for part in classes.split(",")]
    unknown = [part for part in parts if part not in names and not part[:1].isdigit()]
    if unknown:
        raise ValueError(f"no class is called {unknown[0]!r}; {closest(unknown[0], names)[:200]}")
    return [i for part in parts for i in ([names[part]] if part in names else parse_classes(part))]


def from_prompts(
    source: Source, grid: tuple[int, int], prompts: list[str], guided: bool, text: TextOptions
) -> tuple[Condition, Condition | None]:
    """One sample for each prompt, and what guidance leads away from (None = the model's own)."""
    kind = source.model.backbone.conditioning.kind
    if kind == "class":
        raise ValueError("this model is class-conditional; give --classes.")
    if kind == "prompt":
        if text.text_encoder is not None:
            raise ValueError("--text-encoder is for models of text features; this one takes prompts: give --assets.")
        return whole_prompts(source, grid, prompts, guided, text)
    if text.text_encoder is None or text.assets is not None:
        raise ValueError(
            "this model takes text features: give --text-encoder DIR, the T5 it was trained with, and no --assets."
        )
    device = next(source.model.parameters()).device
    features = t5_features(text.text_encoder, prompts, device)
    if text.negative_prompt is None:
        return features, None
    return features, t5_features(text.text_encoder, [text.negative_prompt], device).pad(len(prompts))


def whole_prompts(
    source: Source, grid: tuple[int, int], prompts: list[str], guided: bool, text: TextOptions
) -> tuple[Prompts, Prompts | None]:
    """Whole prefixes; what guidance leads away from is the negative prompt, else the model's or its tokenizer's."""
    import torch

    from flashar_pl.backbones.condition import Prompts
    from flashar_pl.checkpoints.hub import prompt_tokenizer

    backbone = source.model.backbone
    tokens = prompt_tokenizer(find_assets(source, text.assets)).for_grid(grid)
    takes, own = backbone.conditioning, backbone.null_prompt  # what the model was trained with, where it says so
    tokens.check_vocabulary(takes.size, takes.first_visual)
    condition = Prompts(tokens.conditions(prompts, grid))
    if not guided or (text.negative_prompt is None and own is None and backbone.knows_null):
        return condition, None
    if text.negative_prompt is not None:
        start = tokens.prompt(text.negative_prompt)
    else:
        start = tokens.unconditional(source.model.null_style) if own is None else torch.tensor(own, dtype=torch.int64)
    return condition, Prompts([torch.cat([start, tokens.image_prefix(*grid)])]).pad(len(prompts))


def find_assets(source: Source, assets: str | None) -> str:
    """The directory with the prompts' tokenizer: the one given, else the checkpoint's own, else that of its training.

    Raises:
        ValueError: none of them has its files, or the place of the training is a strange one.
    """
    from flashar_pl.checkpoints.hub import find_prompt_tokenizer
    from flashar_pl.checkpoints.named_paths import refusal
    from flashar_pl.tokenizers.text import ADVICE, RANK_FILE

    trained = source.description.training.get("prompts")
    places = [assets] if assets is not None else [source.path, *([] if trained is None else [trained])]
    for place in places:
        if assets is None and place in source.description.strange:
            raise refusal(source.path, "tokenizer of prompts", place, f"add --assets {shlex.quote(place)}")
        if find_prompt_tokenizer(place) is not None:
            return place
    where = " or ".join(places)
    raise ValueError(f"no {RANK_FILE} in {where}, nor the tokenizer.json of a known model; add --assets DIR. {ADVICE}")


def t5_features(directory: str, captions: list[str], device: torch.device) -> TextFeatures:
    """Features of a T5 encoder."""
    from flashar_pl.backbones.condition import TextFeatures
    from flashar_pl.tokenizers.t5 import encode_captions

    return TextFeatures(*encode_captions(directory, captions, device))


def read_text_features(path: str) -> TextFeatures:
    """`TextFeatures` from a .npy, .npz or .safetensors file; a single caption (T, C) becomes a batch of one.

    Raises:
        ValueError: no such file, another format, or no array "features".
    """
    import torch

    from flashar_pl.backbones.condition import TextFeatures

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no text features at {file}; expected a .npy, .npz or .safetensors file.")
    if file.suffix == ".safetensors":
        arrays = read_tensors(file)
    elif file.suffix in (".npy", ".npz"):
        arrays = {name: torch.from_numpy(content) for name, content in read_arrays(file).items()}
        if file.suffix == ".npy":
            arrays = {"features": arrays["array"]}
    else:
        raise ValueError(f"text features at {file}: expected a .npy, .npz or .safetensors file.")
    unknown = arrays.keys() - {"features", "mask"}
    if "features" not in arrays or unknown:
        raise ValueError(f'{file} holds {", ".join(sorted(arrays))}; expected "features" and, if padded, "mask".')
    features, mask = arrays["features"], arrays.get("mask")
    if features.ndim == 2:
        features, mask = features[None], None if mask is None else mask[None]
    return TextFeatures(features.float(), None if mask is None else mask.bool())
