"""Captioned images: lists of captions and paths; or tars, as in sources.py."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from flashar_pl.data.account import Account
from flashar_pl.data.manifest import ConditionSpec
from flashar_pl.data.pictures import parts
from flashar_pl.data.sources import IMAGE_MEMBERS, Names, Source, TarSource, read_file
from flashar_pl.image_files import Unreadable
from flashar_pl.text_files import parse_json, read_lines, read_text

CAPTION_KEYS = ("input_prompt", "caption", "prompt", "text")
IMAGE_KEYS = ("output_image", "image", "image_path", "file_name")
PLACEHOLDERS = ("<image>", "<img>")


class CaptionList(Source):
    """A JSON list or JSONL file of {caption, path of the image}, as in ShareGPT-4o-Image (input_prompt, output_image).

    The paths start from the folder `images`, or from that of the list. The fields are `caption_key` and `image_key`, or
    the first of the known names that the first item has.

    Raises:
        ValueError: not such a list, or an item without the fields (its number is named).
    """

    def __init__(
        self, path: str, images: str | None = None, caption_key: str | None = None, image_key: str | None = None
    ) -> None:
        self.file = file = Path(path).expanduser()
        items = read_items(file)
        self.root = file.parent if images is None else Path(images).expanduser()
        caption_key = caption_key or _pick(items[0], CAPTION_KEYS, "caption", path)
        image_key = image_key or _pick(items[0], IMAGE_KEYS, "image", path)
        self.account = Account()
        self._problems: dict[int, str] = {}
        captions: list[str] = []
        paths: list[str] = []
        for number, item in enumerate(items):
            # An item with an input image is an editing instruction, which does not describe the output.
            if item.get("input_image"):
                self.account.leave_out("edits an input image", f"item {number}")
                continue
            try:
                caption, image = _text(item, caption_key), self._inside(_text(item, image_key))
            except Unreadable as error:
                self._problems[len(paths)] = str(error)
                caption, image = "", f"item {number}"
            for placeholder in PLACEHOLDERS:
                caption = caption.replace(placeholder, "")
            captions.append(caption.strip())
            paths.append(image)
        if not paths:
            raise ValueError(f"Every item of {path} edits an input image; expected text-to-image pairs.")
        self.account.used = len(paths)
        self._captions, self._paths = Names(captions), Names(paths)
        self.condition = ConditionSpec("text")

    def _inside(self, image: str) -> str:
        """The path of an image, if it is below the folder of the images. A list may not read other files."""
        if os.path.relpath(os.path.join(self.root, image), self.root).split("/")[0] == "..":
            raise Unreadable(f"{image} is not below {self.root}; say which folder the paths start from with --images")
        return image

    def __len__(self) -> int:
        return len(self._paths)

    def captions(self) -> list[str]:
        """Of every sample; "" for one without, or without a usable one."""
        return [self._captions[index] for index in range(len(self))]

    def where(self, index: int) -> str:
        return f"{self.file}, {self._paths[index]}" if index in self._problems else str(self.root / self._paths[index])

    def read(self, index: int) -> tuple[bytes, str]:
        if index in self._problems:
            raise Unreadable(self._problems[index])
        return read_file(self.where(index)), self._captions[index]

    def known_bad(self) -> list[int]:
        return list(self._problems)

    def fingerprint(self) -> str:
        return hashlib.sha256((self._captions.digest() + self._paths.digest()).encode()).hexdigest()[:16]


def captioned_images(data: str, images: str | None = None, *keys: str | None) -> Source:
    """A .json or .jsonl list of captions and paths, else tars of jpg + txt. keys: as `CaptionList` takes them."""
    if Path(data).suffix in (".json", ".jsonl"):
        return CaptionList(data, images, *keys)
    if images or any(keys):
        raise ValueError("--caption-key, --image-key and --images are for .json and .jsonl lists; leave them out.")
    return TarSource(data, IMAGE_MEMBERS, "txt")


def cut_validation(source: Source, n: int) -> dict[str, Source]:
    """Split -> its part of a list, of which the validation split has n samples or a few less.

    Which ones follows from their captions alone, and equal captions are in one split. Samples without one are trained
    on. The account of the list is that of the training split.

    Raises:
        ValueError: tars, or a list of no more than n captions.
    """
    if not isinstance(source, CaptionList):
        raise ValueError("--validation is for .json and .jsonl lists; tokenize the tars of each split with --split.")
    captions = source.captions()
    same: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        if caption:
            same.setdefault(hashlib.sha256(caption.encode()).hexdigest(), []).append(index)
    chosen: list[int] = []
    for name in sorted(same):
        if len(chosen) + len(same[name]) <= n:
            chosen += same[name]
    if not chosen or len(chosen) == len(captions):
        raise ValueError(
            f"--validation {n}: {source.file} has {len(captions)} pairs with {len(same)} different captions; expected "
            "fewer for validation than there are, and at least as many as one caption has."
        )
    there = np.isin(np.arange(len(captions)), chosen)  # (N,)
    return parts(source, np.where(there, "validation", "train"))


def read_items(path: Path) -> list[dict[str, Any]]:
    """The objects of a .json list or a .jsonl file. Raises ValueError where it is neither."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a .json list, a .jsonl file, or tars.")
    if path.suffix == ".jsonl":
        items = [parse_json(line, path, number) for number, line in read_lines(path)]
    else:
        items = parse_json(read_text(path), path)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path} holds no list of objects; expected [{{'input_prompt': ..., 'output_image': ...}}].")
    return items


def _pick(item: dict[str, Any], keys: tuple[str, ...], what: str, path: str) -> str:
    if there := [key for key in keys if key in item]:
        return there[0]
    raise ValueError(
        f"The first item of {path} has the fields {', '.join(item)}, none of which is known to hold the {what} "
        f"({', '.join(keys)}). Add --{what}-key NAME."
    )


def _text(item: dict[str, Any], key: str) -> str:
    """The text of a field. Raises `Unreadable`."""
    value = item.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise Unreadable(f"its {key} is {str(value)[:80]!r}; expected text")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise Unreadable(f"its {key} holds half of a character (a lone surrogate)")
    return value
