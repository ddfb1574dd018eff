"""A folder of somebody's pictures as three splits: given as sub-folders, or cut by content.

A picture's split depends on the bytes of its file and on how many pictures its class has, not on names or order: equal
files are never in two splits.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from flashar_pl.data.account import Account, is_hidden
from flashar_pl.data.folders import list_images
from flashar_pl.data.manifest import SPLITS, ConditionSpec
from flashar_pl.data.sources import Files, ImageFolder, Names, Source
from flashar_pl.image_files import Unreadable

GIVEN = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""Names of the sub-folders that are splits already."""
SHARE = 0.05
"""Of the pictures, in validation and in test, each at least one."""
ELSEWHERE = "in other splits"


class OneClass(Files):
    """All images below a folder as one class, whatever their sub-folders."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.account = Account()
        self._paths = Names(list_images(self.root, self.account))
        self._labels = np.zeros(len(self._paths), np.int32)
        self.class_names = (self.root.resolve().name or "pictures",)
        self.condition = ConditionSpec("class", num_classes=1)

    def fingerprint(self) -> str:
        return self._paths.digest()


class Part(Source):
    """Some samples of another source, numbered anew."""

    def __init__(self, whole: Source, chosen: np.ndarray, account: Account) -> None:
        """chosen: (n,) their numbers there."""
        self._whole, self._chosen = whole, chosen
        self.condition, self.class_names = whole.condition, whole.class_names
        self.account = account

    def __len__(self) -> int:
        return len(self._chosen)

    def where(self, index: int) -> str:
        return self._whole.where(int(self._chosen[index]))

    def read(self, index: int) -> tuple[bytes, int | str]:
        return self._whole.read(int(self._chosen[index]))

    def known_bad(self) -> list[int]:
        return np.flatnonzero(np.isin(self._chosen, self._whole.known_bad())).tolist()

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self._chosen.astype(np.int64).tobytes()).hexdigest()[:16]
        return f"{self._whole.fingerprint()}-{chosen}"


def split_pictures(folder: str | Path, one_class: bool = False) -> tuple[dict[str, Source], str]:
    """Split -> its pictures, and in words how they were split.

    FOLDER/train (with val, valid or validation, and test) are taken as they are, and what is missing of them is cut
    from train. Otherwise all pictures are cut.

    Args:
        folder: a sub-folder for each class, or pictures without; below FOLDER/train the same.
        one_class: sub-folders are no classes.

    Raises:
        ValueError: no such folder, no pictures, fewer than three to cut, or classes that train lacks.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with pictures, or with a sub-folder of them a class.")
    given = {split: place for split in SPLITS if (place := _given(root, split)) is not None}
    if "train" not in given:
        cut = _cut(_whole(root, one_class, None), root, SPLITS[1:])
        return cut, _words(cut, "by content")
    train = _whole(given["train"], one_class, None)
    missing = tuple(split for split in SPLITS[1:] if split not in given)
    found = _cut(train, given["train"], missing) if missing else {"train": train}
    for split in SPLITS[1:]:
        if split in given:
            found[split] = _whole(given[split], one_class or isinstance(train, OneClass), train)
    ordered = {split: found[split] for split in SPLITS}
    how = "as the folders" + (f", {' and '.join(missing)} cut from train by content" if missing else "")
    return ordered, _words(ordered, how)


def _given(root: Path, split: str) -> Path | None:
    return next((root / name for name in GIVEN[split] if (root / name).is_dir()), None)


def _whole(root: Path, one_class: bool, like: Source | None) -> Source:
    """All pictures of a folder. like: a source whose classes they have."""
    if not one_class and any(entry.is_dir() and not is_hidden(entry.name) for entry in os.scandir(root)):
        names = None if like is None else like.class_names
        return ImageFolder(str(root), names, "the training pictures lack")
    found = OneClass(root)
    if not len(found):
        raise ValueError(f"{root} holds no pictures ({found.account}).")
    if like is not None:
        if like.condition != found.condition:
            raise ValueError(f"{root} has no class folders; expected {', '.join(like.class_names[:10])}.")
        found.class_names = like.class_names
    return found


def _cut(whole: Source, folder: Path, splits: tuple[str, ...]) -> dict[str, Source]:
    """Cut validation, test or both from the source of a folder; the rest is train."""
    hashes, labels = _contents(whole)
    try:
        return parts(whole, assign(hashes, labels, splits))
    except ValueError as error:
        raise ValueError(f"{folder} holds {len(hashes)} pictures: {error} Add pictures.") from error


def parts(whole: Source, names: np.ndarray) -> dict[str, Source]:
    """Split -> the samples of a source whose split (N,) it is. That of training answers for all that it holds."""
    found: dict[str, Source] = {}
    for split in filter(set(names).__contains__, SPLITS):
        chosen, others = np.flatnonzero(names == split), np.flatnonzero(names != split)
        account = Account(used=len(chosen))
        if split == "train":
            account.left_out, account.examples = dict(whole.account.left_out), dict(whole.account.examples)
            account.leave_out(ELSEWHERE, whole.where(int(others[0])), len(others))
        found[split] = Part(whole, chosen, account)
    return found


def _contents(whole: Source) -> tuple[list[str], list[int]]:
    """Hash and class of each picture; of one that cannot be opened, the hash of its path."""
    hashes, labels = [], []
    for index in range(len(whole)):
        try:
            data, label = whole.read(index)
        except Unreadable:
            data, label = whole.where(index).encode("utf-8", "surrogateescape"), 0
        hashes.append(hashlib.sha256(data).hexdigest())
        labels.append(int(label))
    return hashes, labels


def assign(hashes: list[str], labels: list[int], splits: tuple[str, ...]) -> np.ndarray:
    """The split (n,) of each picture: `SHARE` in each of `splits`, spread over the classes; the rest is "train".

    hashes: of the contents; equal ones get one split. labels: classes.
    """
    first = dict(zip(reversed(hashes), reversed(labels)))  # contents -> class of its first picture
    if len(first) <= len(splits):
        raise ValueError(
            f"{len(first)} different ones; expected {len(splits) + 1} or more, for train, {' and '.join(splits)}."
        )
    order: list[tuple[float, str]] = []
    for label in sorted(set(first.values())):
        members = sorted(name for name, its in first.items() if its == label)
        order += [((rank + 0.5) / len(members), name) for rank, name in enumerate(members)]
    order.sort()
    size = max(1, round(SHARE * len(order)))
    of = {name: splits[i // size] for i, (_, name) in enumerate(order[: size * len(splits)])}
    return np.array([of.get(name, "train") for name in hashes])


def _words(splits: dict[str, Source], how: str) -> str:
    return f"{', '.join(f'{len(source):,} {split}' for split, source in splits.items())} ({how})"
