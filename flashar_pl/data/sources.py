"""Where raw samples come from: image folders, WebDataset tars, caption lists. Nothing here knows a tokenizer.

A source numbers its samples 0 .. N - 1; the number is the sample's id for ever. Sources are sent to worker
processes, so their lists are kept in numpy arrays, which forked workers share.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from flashar_pl.data.images import EXTENSIONS, Unreadable
from flashar_pl.data.manifest import ConditionSpec
from flashar_pl.data.tars import find_tars, read_range, tar_records

IMAGE_MEMBERS = tuple(extension.lstrip(".") for extension in EXTENSIONS)
CAPTION_KEYS = ("input_prompt", "caption", "prompt", "text")
IMAGE_KEYS = ("output_image", "image", "image_path", "file_name")
PLACEHOLDERS = ("<image>", "<img>")


class Source(ABC):
    """Numbered raw samples with their conditions."""

    condition: ConditionSpec
    skipped: Mapping[str, int] = MappingProxyType({})
    """Samples that the source itself leaves out, by reason."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """How a person finds the sample."""

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int | str]:
        """The sample's bytes and its class id or caption. Raises `Unreadable`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the sources lists: names and conditions, not contents."""


class Names:
    """Many strings in one buffer."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = int(self._ends[index - 1]) if index else 0
        return self._bytes[begin : int(self._ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def digest(self, *others: np.ndarray) -> str:
        """A hash of the names and of arrays that belong to them."""
        found = hashlib.sha256(self._bytes.tobytes())
        for values in (self._ends, *others):
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()[:16]


class ImageFolder(Source):
    """Images in one sub-folder for each class; `classes` names them in the order of their ids.

    Otherwise order and ids are those of torchvision's ImageFolder: classes sorted by name, within a class the folders
    and the files sorted by name. Sub-folders of a class folder belong to the class.

    Raises:
        ValueError: no class folders, no images, or a folder that `classes` does not list.
    """

    def __init__(self, root: str, classes: list[str] | None = None) -> None:
        self.root = Path(root)
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise ValueError(
                f"{root} has no class folders and no tars; expected ROOT/CLASS/IMAGE.JPEG, one folder for each class."
            )
        classes = folders if classes is None else classes
        labels = {name: label for label, name in enumerate(classes)}
        if unknown := [name for name in folders if name not in labels]:
            raise ValueError(f"{root} has folders that the list of classes lacks: {', '.join(unknown[:5])}.")
        paths: list[str] = []
        ids = array("i")
        for name in (name for name in classes if name in folders):
            for folder, _, files in sorted(os.walk(self.root / name, followlinks=True)):
                relative = os.path.relpath(folder, self.root)
                paths += [f"{relative}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
            ids.extend([labels[name]] * (len(paths) - len(ids)))
        if not paths:
            raise ValueError(f"{root} has no images in its class folders (looked for {', '.join(EXTENSIONS)}).")
        self._labels = np.array(ids, dtype=np.int32)
        self._paths = Names(paths)
        self.condition = ConditionSpec("class", num_classes=len(classes))

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        return read_file(self.where(index)), int(self._labels[index])

    def fingerprint(self) -> str:
        return self._paths.digest(self._labels)


class TarSource(Source):
    """Records of WebDataset tars, in the order of the tars' names and of each tar.

    Args:
        location: as `find_tars` takes it.
        payload: extensions of the member that holds the sample, such as ("jpg", "jpeg", "png").
        label: extension of the member that holds the condition: "cls" (class id or class name) or "txt" (caption).
        classes: for "cls", class names in the order of their ids; None = the members hold ids below `num_classes`.

    Raises:
        ValueError: no tars, a damaged tar, a class that is no id below `num_classes` or not among `classes`.
    """

    def __init__(
        self,
        location: str,
        payload: tuple[str, ...],
        label: str,
        classes: list[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self._tars = find_tars(location)
        self._label = label
        ids = None
        if classes is not None:
            ids, num_classes = {name: i for i, name in enumerate(classes)}, len(classes)
        names: list[str] = []
        columns = array("q")
        for tar, path in enumerate(self._tars):
            for key, members in tar_records(path):
                sample = next((members[name] for name in payload if name in members), (0, -1))
                given = members.get(label, (0, -1))
                number = -1
                if label == "cls" and given[1] >= 0:
                    number = class_id(read_range(path, *given), ids, num_classes, f"{path}: {key}.cls")
                columns.extend((tar, *sample, *given, number))
                names.append(key)
        if not names:
            raise ValueError(f"The tars at {location} are empty.")
        self._rows = np.frombuffer(columns, dtype=np.int64).reshape(-1, 6)  # (N, 6)
        if (self._rows[:, 2] < 0).all():
            raise ValueError(f"The tars at {location} hold no {', '.join(payload)}; the first record is {names[0]!r}.")
        self._names = Names(names)
        self._payload = payload
        self.condition = ConditionSpec("class", num_classes=num_classes) if label == "cls" else ConditionSpec("text")

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._tars[int(self._rows[index, 0])]}: {self._names[index]}"

    def read(self, index: int) -> tuple[bytes, int | str]:
        tar, at, size, label_at, label_size, number = (int(value) for value in self._rows[index])
        if size < 0:
            raise Unreadable(f"no {' or '.join(self._payload[:2])} in the record")
        if label_size < 0:
            raise Unreadable(f"no {self._label} in the record")
        try:
            data = read_range(self._tars[tar], at, size)
            if self._label == "cls":
                return data, number
            return data, read_range(self._tars[tar], label_at, label_size).decode("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    def fingerprint(self) -> str:
        return self._names.digest(self._rows)


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
        items = read_items(Path(path))
        self.root = Path(path).parent if images is None else Path(images)
        caption_key = caption_key or _pick(items[0], CAPTION_KEYS, "caption", path)
        image_key = image_key or _pick(items[0], IMAGE_KEYS, "image", path)
        # An item with an input image is an editing instruction, which does not describe the output.
        kept = [i for i, item in enumerate(items) if not item.get("input_image")]
        if not kept:
            raise ValueError(f"Every item of {path} edits an input image; expected text-to-image pairs.")
        captions = [_field(items[i], caption_key, i, path) for i in kept]
        for placeholder in PLACEHOLDERS:
            captions = [caption.replace(placeholder, "") for caption in captions]
        self._captions = Names(caption.strip() for caption in captions)
        self._paths = Names(_field(items[i], image_key, i, path) for i in kept)
        self.condition = ConditionSpec("text")
        if len(kept) < len(items):
            self.skipped = {"edits an input image": len(items) - len(kept)}

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> tuple[bytes, str]:
        return read_file(self.where(index)), self._captions[index]

    def fingerprint(self) -> str:
        return hashlib.sha256((self._captions.digest() + self._paths.digest()).encode()).hexdigest()[:16]


def class_images(images: str, classes: str | None, num_classes: int | None, usual: int | None = None) -> Source:
    """An image folder if `images` is a folder with sub-folders, else tars of jpg + cls.

    classes: file of class names; num_classes: of tars with class ids, as typed, else it is `usual`.

    Raises:
        ValueError: both tars and folders, or options that do not go with what is there.
    """
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
    return TarSource(images, IMAGE_MEMBERS, "cls", names, num_classes or usual)


def captioned_images(data: str, images: str | None = None, *keys: str | None) -> Source:
    """A .json or .jsonl list of captions and paths, else tars of jpg + txt. keys: as `CaptionList` takes them."""
    if Path(data).suffix in (".json", ".jsonl"):
        return CaptionList(data, images, *keys)
    if images or any(keys):
        raise ValueError("--caption-key, --image-key and --images are for .json and .jsonl lists; leave them out.")
    return TarSource(data, IMAGE_MEMBERS, "txt")


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises `Unreadable`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error


def read_items(path: Path) -> list[dict[str, Any]]:
    """The objects of a .json list or a .jsonl file. Raises ValueError where it is neither."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a .json list, a .jsonl file, or tars.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as {path.suffix.lstrip('.') or 'JSON'}: {error}") from error
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path} holds no list of objects; expected [{{'input_prompt': ..., 'output_image': ...}}].")
    return items


def read_classes(path: str | None) -> list[str] | None:
    """Class names, one a line, the first is class 0. Raises ValueError for a missing file, no or repeated names."""
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path} is no file; expected class names, one a line.")
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} holds {len(names)} class names, {len(set(names))} different ones; each must differ.")
    return names


def class_id(raw: bytes, ids: dict[str, int] | None, num_classes: int | None, where: str) -> int:
    text = raw.decode("utf-8", "replace").strip()
    assert num_classes is not None
    if ids is not None:
        if text not in ids:
            raise ValueError(f"{where} holds {text!r}, which the list of classes lacks.")
        return ids[text]
    if not text.isdigit() or int(text) >= num_classes:
        raise ValueError(
            f"{where} holds {text!r}; expected a class id 0 .. {num_classes - 1}. Add --num-classes N, or --classes "
            "FILE if the tars hold class names."
        )
    return int(text)


def _pick(item: dict[str, Any], keys: tuple[str, ...], what: str, path: str) -> str:
    if there := [key for key in keys if key in item]:
        return there[0]
    raise ValueError(
        f"The first item of {path} has the fields {', '.join(item)}, none of which is known to hold the {what} "
        f"({', '.join(keys)}). Add --{what}-key NAME."
    )


def _field(item: dict[str, Any], key: str, index: int, path: str) -> str:
    value = item.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"Item {index} of {path} has {key} = {value!r}; expected text.")
    return value
