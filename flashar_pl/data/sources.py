"""Where raw samples come from: image folders and WebDataset tars (captions.py: lists). Nothing here knows a tokenizer.

A source numbers its samples 0 .. N - 1; the number is the sample's id for ever. Sources are sent to worker
processes, so their lists are kept in numpy arrays, which forked workers share.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flashar_pl.data.account import Account, is_hidden
from flashar_pl.data.folders import NO_IMAGE, list_images
from flashar_pl.data.manifest import ConditionSpec, first_difference
from flashar_pl.data.tars import find_tars, read_range, tar_records
from flashar_pl.image_files import EXTENSIONS, Unreadable
from flashar_pl.text_files import read_lines

IMAGE_MEMBERS = tuple(extension.lstrip(".") for extension in EXTENSIONS)

EMPTY = "folders without images"


class Source(ABC):
    """Numbered raw samples with their conditions."""

    condition: ConditionSpec
    account: Account
    """What it found, and what of that are no samples."""
    class_names: tuple[str, ...] = ()
    """Where it knows them, in the order of their ids."""

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

    def known_bad(self) -> list[int]:
        """Samples that are known to be unusable before they are opened; `read` says why."""
        return []


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


class Files(Source):
    """Files below a folder, with their class ids."""

    root: Path
    _paths: Names
    _labels: np.ndarray

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        return read_file(self.where(index)), int(self._labels[index])

    def fingerprint(self) -> str:
        return self._paths.digest(self._labels)


class ImageFolder(Files):
    """Images in one sub-folder for each class; `classes` names them in the order of their ids.

    Otherwise order and ids are those of torchvision's ImageFolder: classes sorted by name, within a class the folders
    and the files sorted by name. Sub-folders of a class folder belong to the class. Folders that are hidden or hold no
    images are no classes.

    Raises:
        ValueError: no class folders, no images, or a folder of images that `classes` lacks.
    """

    def __init__(
        self, root: str, classes: Sequence[str] | None = None, who_lacks: str = "the list of classes lacks"
    ) -> None:
        self.root = Path(root).expanduser()
        self.account = Account()
        folders: dict[str, list[str]] = {}
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self.account.leave_out("hidden", entry.name)
            elif not entry.is_dir():
                image = entry.name.lower().endswith(EXTENSIONS)
                self.account.leave_out("images outside the class folders" if image else NO_IMAGE, entry.name)
            elif images := list_images(self.root, self.account, entry.name):
                folders[entry.name] = images
            else:
                self.account.leave_out(EMPTY, entry.name)
        if not folders:
            found = "class folders and no tars" if EMPTY not in self.account.left_out else "images in its class folders"
            raise ValueError(f"{root} has no {found}; expected ROOT/CLASS/IMAGE.JPEG ({self.account}).")
        classes = list(folders) if classes is None else classes
        if unknown := [name for name in folders if name not in classes]:
            raise ValueError(
                f"{root} has folders that {who_lacks}: {', '.join(unknown[:5])}; expected {', '.join(classes[:10])}"
                f"{' ...' if len(classes) > 10 else ''}."
            )
        held = [(label, folders[name]) for label, name in enumerate(classes) if name in folders]
        self._labels = np.repeat([label for label, _ in held], [len(paths) for _, paths in held]).astype(np.int32)
        self._paths = Names(path for _, paths in held for path in paths)
        self.class_names = tuple(classes)
        self.condition = ConditionSpec("class", num_classes=len(classes))


class TarSource(Source):
    """Records of WebDataset tars, in the order of the tars' names and of each tar.

    A record without the sample, or without a usable condition, is a sample that cannot be read; one without both is
    none.

    Args:
        location: as `find_tars` takes it.
        payload: extensions of the member that holds the sample, such as ("jpg", "jpeg", "png").
        label: extension of the member that holds the condition: "cls" (class id or class name) or "txt" (caption).
        classes: for "cls", class names in the order of their ids; None = the members hold ids below `num_classes`.

    Raises:
        ValueError: no tars, a damaged tar, no records with both, or the two in different records of one key.
    """

    def __init__(
        self,
        location: str,
        payload: tuple[str, ...],
        label: str,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.account = Account()
        self._tars = find_tars(location, self.account)
        self._label, self._payload = label, payload
        self._ids: dict[str, int] | None = None
        if classes is not None:
            self._ids, num_classes = {name: i for i, name in enumerate(classes)}, len(classes)
            self.class_names = tuple(classes)
        self.condition = ConditionSpec("class", num_classes=num_classes) if label == "cls" else ConditionSpec("text")
        names: list[str] = []
        columns = array("q")
        for tar, path in enumerate(self._tars):
            for key, members in tar_records(path, self.account):
                sample = next((members[name] for name in payload if name in members), (0, -1))
                given = members.get(label, (0, -1))
                if sample[1] < 0 and given[1] < 0:
                    held = ", ".join(list(members)[:4])
                    reason = f"records without {payload[0]} and {label}"
                    self.account.leave_out(reason, f"{key!r} of {path}, which holds {held}")
                    continue
                number = -1
                if label == "cls" and given[1] >= 0:
                    number = self._number(path, given)
                columns.extend((tar, *sample, *given, number))
                names.append(key)
        self._rows = np.frombuffer(columns, dtype=np.int64).reshape(-1, 6)  # (N, 6)
        self._names = Names(names)
        self.account.used = len(names)
        self._check_records(location)

    def _number(self, path: Path, place: tuple[int, int]) -> int:
        """The class id in a tar's member, -1 for none."""
        assert self.condition.num_classes is not None
        try:
            return class_id(read_range(path, *place), self._ids, self.condition.num_classes)
        except (Unreadable, OSError):
            return -1

    def _check_records(self, location: str) -> None:
        """Raises ValueError where nothing is as WebDataset has it, with the reason."""
        lacks_sample, lacks_label = self._rows[:, 2] < 0, self._rows[:, 4] < 0
        found = f"The tars at {location} hold no records of {self._payload[0]} and {self._label}"
        if not len(self):
            raise ValueError(
                f"{found}. Members of a record have one name up to its first dot; rename files with more dots. There "
                f"are: {self.account}."
            )
        halves = [
            {(self._rows[i, 0], self._names[int(i)]) for i in np.flatnonzero(lacks)}
            for lacks in (lacks_sample, lacks_label)
        ]
        if apart := halves[0] & halves[1]:
            tar, key = min(apart)
            raise ValueError(
                f"{self._tars[tar]}: the members of {len(apart)} records do not stand side by side, such as those of "
                f"{key!r}. Pack them again, sorted: tar --sort=name -cf NEW.tar FOLDER."
            )
        if (lacks_sample | lacks_label).all():
            raise ValueError(
                f"{found}; the first one, {self._names[0]!r}, lacks {self._label if lacks_label[0] else 'an image'}. "
                f"Conditions are read from .{self._label} members only, not from .json."
            )

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
            given = None if number >= 0 else read_range(self._tars[tar], label_at, label_size)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        return data, number if given is None else condition_of(given, self._ids, self.condition.num_classes)

    def known_bad(self) -> list[int]:
        needed = [2, 4, 5] if self._label == "cls" else [2, 4]
        return np.flatnonzero((self._rows[:, needed] < 0).any(axis=1)).tolist()

    def fingerprint(self) -> str:
        return self._names.digest(self._rows)


def class_images(
    images: str,
    classes: str | None,
    num_classes: int | None,
    usual: int | None = None,
    known: tuple[str, ...] = (),
) -> Source:
    """An image folder if `images` is a folder with sub-folders, else tars of jpg + cls.

    classes: file of class names; num_classes: of tars with class ids, as typed, else it is `usual`; known: class names
    of the shards these images belong to, which then fix the ids.

    Raises:
        ValueError: both tars and folders, other classes than those known, or options that do not go with what is there.
    """
    names = read_classes(classes, known)
    folder = Path(images).expanduser()
    if folder.is_dir():
        entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
        has_tars, has_folders = any(e.suffix.lower() == ".tar" for e in entries), any(e.is_dir() for e in entries)
        if has_tars and has_folders:
            raise ValueError(
                f"{images} holds both tars and folders; give the tars as a pattern such as {images}/*.tar."
            )
        if not has_tars:
            if num_classes is not None:
                raise ValueError(
                    "--num-classes is for tars; the classes of a folder are its sub-folders, or --classes."
                )
            if names is None and known:
                return ImageFolder(images, known, "the shards that are there lack")
            return ImageFolder(images, names)
    if names is not None and num_classes is not None:
        raise ValueError("give --classes or --num-classes, not both.")
    return TarSource(images, IMAGE_MEMBERS, "cls", names, num_classes or usual)


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises `Unreadable`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error


def read_classes(path: str | None, known: tuple[str, ...] = ()) -> list[str] | None:
    """Class names, one a line, the first is class 0.

    known: those of the shards that the images belong to, where they have names. Raises ValueError for a missing file,
    no or repeated names, or others than those known.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path} is no file; expected class names, one a line.")
    names = [line for _, line in read_lines(file)]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} holds {len(names)} class names, {len(set(names))} different ones; each must differ.")
    given, there = first_difference(names, known or names)
    if given != there:
        raise ValueError(f"{path} has {given} where the shards that are there have {there}; splits share the classes.")
    return names


def condition_of(raw: bytes, ids: dict[str, int] | None, num_classes: int | None) -> int | str:
    """What the member of a record says: a class, see `class_id`, or with num_classes None a caption.

    Raises `Unreadable`.
    """
    if num_classes is not None:
        return class_id(raw, ids, num_classes)
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def class_id(raw: bytes, ids: dict[str, int] | None, num_classes: int) -> int:
    """The class that a label file names. Raises `Unreadable`."""
    text = raw.decode("utf-8-sig", "replace").strip()
    if ids is not None:
        if text not in ids:
            raise Unreadable(f"the label {text[:80]!r} is not in the list of classes")
        return ids[text]
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) >= num_classes:
        raise Unreadable(
            f"the label {text[:80]!r} is no class id 0 .. {num_classes - 1}; add --num-classes N, or --classes FILE if "
            "the labels are class names"
        )
    return int(text)
