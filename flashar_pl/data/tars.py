"""Foreign WebDataset tars, indexed once and then read by offset.

A tar reader that meets a damaged header ends quietly, as if the tar were shorter. Here every tar must end with the
block of zeros that tar writers put there.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

ZEROS = bytes(512)


def find_tars(location: str) -> list[Path]:
    """The tars that `location` names: a directory, one file, or a pattern such as "train-{0000..1023}.tar" or "*.tar".

    Returns them sorted by name. Raises ValueError if there are none, or one is missing.
    """
    path = Path(location)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif any(sign in location for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(location))
    else:
        found = [Path(name) for name in braceexpand(location)]
    if not found:
        raise ValueError(f"No tars at {location}; expected a directory of .tar files, a tar, or a pattern.")
    for tar in found:
        if not tar.is_file():
            raise ValueError(
                f"{tar} does not exist; expected a folder, a tar, or a pattern of tars (given: {location})."
            )
    return found


def tar_records(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The records of a WebDataset tar: (key, {extension in lower case: (offset, bytes)}).

    A record is a run of members whose names agree up to the first dot of the file name. Raises ValueError for a tar
    that is compressed, truncated, or damaged in the middle.
    """
    for key, group in groupby(_files(path), key=lambda file: file[0]):
        yield key, {extension: place for _, extension, place in group}


def _files(path: Path) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(key, extension, (offset, bytes)) of the regular files of a tar."""
    advice = "Copy or download it again."
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg():
                    folder, slash, base = info.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    yield folder + slash + stem, extension.lower(), (info.offset_data, info.size)
                tar.members = []  # type: ignore[attr-defined]  # else it remembers every member
            end = tar.offset  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no readable, uncompressed tar: {error}. {advice}") from error
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(512)
    if block != ZEROS:
        raise ValueError(f"The tar {path} has no end mark at byte {end}: it is truncated or damaged there. {advice}")


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a file. Raises OSError if they cannot be read."""
    data = os.pread(_opened(path).fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends within the {size} bytes at {offset}")
    return data


@lru_cache(maxsize=64)
def _opened(path: Path) -> BinaryIO:
    return path.open("rb")
