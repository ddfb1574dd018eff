"""Foreign WebDataset tars, indexed once and then read by offset.

A tar reader that meets a damaged header ends quietly, as if the tar were shorter. Here every tar must end with the
block of zeros that tar writers put there, and whatever follows it must be another tar (`cat a.tar b.tar > both.tar`).
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

from braceexpand import braceexpand

from flashar_pl.data.account import Account, is_hidden
from flashar_pl.text_files import BROKEN, need_file

T = TypeVar("T")

BLOCK = 512
ZEROS = bytes(BLOCK)
READ = 2048 * BLOCK
"""Bytes read at once behind the end of a tar."""
NO_TAR = "not named NAME.tar (compressed ones are to be unpacked to .tar)"
AGAIN = "Copy or download it again."


def find_tars(location: str, account: Account | None = None) -> list[Path]:
    """The tars that `location` names: a directory, one file, or a pattern such as "train-{0000..1023}.tar" or "*.tar".

    ~ is the home directory, and what exists under the name as it is given is no pattern: a file, or the folder that a
    pattern begins with. Returns them sorted by name. What else a directory holds goes to the account. Raises ValueError
    if there are none, or one is missing.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        found = []
        for entry in sorted(path.iterdir()):
            if not is_hidden(entry.name) and entry.name.lower().endswith(".tar"):
                found.append(entry)
            elif account is not None:
                account.leave_out("hidden" if is_hidden(entry.name) else NO_TAR, entry.name)
    else:
        found = [path] if path.is_file() else _matches(path)
    if not found:
        raise ValueError(f"No tars at {location}; expected a directory of .tar files, a tar, or a pattern.")
    for tar in found:
        if not tar.is_file():
            raise ValueError(
                f"{tar} does not exist; expected a folder, a tar, or a pattern of tars (given: {location})."
            )
    return found


def _matches(pattern: Path) -> list[Path]:
    """The files that a pattern means, below the longest folder of it that exists by its very name."""
    folder = next(parent for parent in pattern.parents if parent.exists())
    found: list[Path] = []
    try:
        names = list(braceexpand(str(pattern.relative_to(folder))))
    except ValueError as error:  # braces that do not close
        raise ValueError(f"No tars at {pattern}: {error}.") from error
    for name in names:
        if any(sign in name for sign in "*?[") and not (folder / name).exists():
            found += sorted(folder / match for match in glob.glob(name, root_dir=folder))
        else:
            found.append(folder / name)
    return found


def tar_records(path: Path, account: Account | None = None) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The records of a WebDataset tar: (key, {extension in lower case: (offset, bytes)}), see `grouped`.

    Hidden members go to the account. Raises ValueError for a tar that is compressed, truncated, or damaged in the
    middle.
    """
    kept = Account() if account is None else account
    return grouped(_files(path), lambda name: kept.leave_out("hidden", f"{path.name}: {name}"))


def grouped(files: Iterable[tuple[str, T]], hidden: Callable[[str], object]) -> Iterator[tuple[str, dict[str, T]]]:
    """The records of a tar's files (name, content): (key, {extension in lower case: content}).

    A record is a run of members whose names agree up to the first dot of the file name; an extension that comes again
    begins the next one, so that repeated keys lose nothing. `hidden` is told the names of members that are nobody's
    data (._a.jpg), which may stand within a record.
    """
    key, members = "", dict[str, T]()
    for name, content in files:
        if any(map(is_hidden, name.split("/"))):
            hidden(name)
            continue
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        own, extension = folder + slash + stem, extension.lower()
        if members and (own != key or extension in members):
            yield key, members
            members = {}
        key = own
        members[extension] = content
    if members:
        yield key, members


def _files(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, bytes)) of the regular files of a tar, or of several in one file."""
    with open(need_file(path), "rb") as file:
        begin: int | None = 0
        while begin is not None:
            file.seek(begin)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (info := tar.next()) is not None:
                        if info.size < 0:
                            raise ValueError(f"{info.name!r} has a size of {info.size} bytes")
                        if info.isreg():
                            yield info.name, (info.offset_data, info.size)
                        tar.members = []  # type: ignore[attr-defined]  # else it remembers every member
                    end = tar.offset  # type: ignore[attr-defined]
            except (tarfile.TarError, *BROKEN) as error:
                raise ValueError(f"{path} is no readable, uncompressed tar: {error}. {AGAIN}") from error
            file.seek(end)
            if file.read(BLOCK) != ZEROS:
                raise ValueError(
                    f"The tar {path} has no end mark at byte {end}: it is truncated or damaged there. {AGAIN}"
                )
            begin = _content(file, end)


def _content(file: BinaryIO, begin: int) -> int | None:
    """Where the first block that is not empty stands from `begin` on; None = nothing follows."""
    file.seek(begin)
    while data := file.read(READ):
        if data.count(0) < len(data):
            return begin + (len(data) - len(data.lstrip(b"\0"))) // BLOCK * BLOCK
        begin += len(data)
    return None


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a file. Raises OSError if they cannot be read."""
    data = os.pread(_opened(path).fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends within the {size} bytes at {offset}")
    return data


@lru_cache(maxsize=64)
def _opened(path: Path) -> BinaryIO:
    return path.open("rb")
