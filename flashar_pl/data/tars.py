"""Foreign WebDataset tars, indexed once and then read by offset.

A tar reader that meets a damaged header ends quietly, as if the tar were shorter. Here every tar must end with the
block of zeros that tar writers put there.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

ZEROS = bytes(512)


def find_tars(location: str) -> list[Path]:
    """The tars that `location` names: a directory, one file, or a pattern such as "train-{0000..1023}.tar" or "*.tar".

    Returns them sorted by name. Raises ValueError if there are none, or one is missing.
    """
    path = Path(location)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif any(sign in location for sign in "*?["):
        import glob

        found = sorted(Path(name) for name in glob.glob(location))
    else:
        import braceexpand

        found = [Path(name) for name in braceexpand.braceexpand(location)]
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

    A record is a run of members whose names agree up to the first dot of the file name.

    Raises:
        ValueError: not an uncompressed tar, truncated, or damaged in the middle.
    """
    key = ""
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in _files(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        found = f"{folder}/{stem}" if folder else stem
        if found != key and members:
            yield key, members
            members = {}
        key = found
        members[extension.lower()] = (offset, size)
    if members:
        yield key, members


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of the regular files of a tar."""
    advice = "Copy or download it again."
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg():
                    yield info.name, info.offset_data, info.size
                tar.members = []  # type: ignore[attr-defined]  # else it remembers every member
            end = tar.offset  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no readable, uncompressed tar: {error}. {advice}") from error
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(512)
    if block != ZEROS:
        raise ValueError(f"The tar {path} has no end mark at byte {end}: it is truncated or damaged there. {advice}")


class TarFiles:
    """Reads byte ranges of some tars; can be sent to worker processes."""

    OPEN = 64

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_open": {}}

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of tar number `tar`. Raises OSError if they cannot be read."""
        if tar not in self._open:
            if len(self._open) >= self.OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[tar] = os.open(self.paths[tar], os.O_RDONLY)
        data = os.pread(self._open[tar], size, offset)
        if len(data) != size:
            raise OSError(f"{self.paths[tar]} ends within the {size} bytes at {offset}")
        return data

    def close(self) -> None:
        """Close the tars that are open."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def __del__(self) -> None:
        self.close()
