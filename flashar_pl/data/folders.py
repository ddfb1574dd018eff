"""Image files of a folder, in one order and with an account of the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flashar_pl.data.account import Account, is_hidden
from flashar_pl.image_files import EXTENSIONS

NO_IMAGE = "not named as an image"
LOOP = "links to a folder that is read already"


def list_images(root: Path, account: Account, below: str = "") -> list[str]:
    """The images in `root`/`below` and its sub-folders: their paths from `root`, in the order of torchvision.

    That is, the folders sorted by path, the files of each by name. Links are followed, but no folder is read twice.
    What is no image goes to the account. Raises ValueError where a folder cannot be listed.
    """
    paths: list[str] = []
    for folder, files in sorted(_walk(root / below, root, account)):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        for file in sorted(files):
            if is_hidden(file):
                account.leave_out("hidden", prefix + file)
            elif file.lower().endswith(EXTENSIONS):
                paths.append(prefix + file)
            else:
                account.leave_out(NO_IMAGE, prefix + file)
    account.used += len(paths)
    return paths


def _walk(top: Path, root: Path, account: Account) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of a folder and those below it; a folder between `root` and `top` is not entered again."""
    seen = {_identity(parent) for parent in (root, *top.parents) if parent.is_relative_to(root) and parent != top}
    for folder, folders, files in os.walk(top, followlinks=True, onerror=_cannot_list):
        if (identity := _identity(folder)) in seen:
            account.leave_out(LOOP, os.path.relpath(folder, root))
            folders.clear()
            continue
        seen.add(identity)
        for name in filter(is_hidden, folders):
            account.leave_out("hidden", os.path.relpath(Path(folder, name), root))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield folder, files


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _cannot_list(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be listed: {error.strerror}.") from error
