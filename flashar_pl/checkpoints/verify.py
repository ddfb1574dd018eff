"""Whether a checkpoint is whole, and which one beside a damaged one is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory, read_header
from flashar_pl.integrity import (
    Damaged,
    check_directory,
    check_safetensors,
    check_torch_file,
    have_crcs,
    is_archive,
    listed,
    zip_entries,
)
from flashar_pl.tensor_files import META, is_sharded, read_tensors
from flashar_pl.text_files import need_file, read_json

BESIDE = "among the checkpoints beside it."


def verify(path: Path) -> str:
    """Compare a checkpoint of any kind with its checksums; what was compared. ValueError naming what is damaged."""
    if not path.is_dir():
        if need_file(path).suffix == ".safetensors":
            return _safetensors([path])
        check_torch_file(path, again=True)
        read_tensors(path, mmap=True)
        with_crc = is_archive(path) and have_crcs(zip_entries(path, path))
        return "every tensor has its CRC-32" if with_crc else "it can be read; it was saved without checksums"
    if check_directory(path, again=True):
        return f"{len(listed(path) or ())} files have their CRC-32s"
    if is_sharded(path):
        from flashar_pl.checkpoints.sharded import SafeReader  # torch.distributed.checkpoint takes seconds

        check_torch_file(path / META, again=True)
        return f"{len(SafeReader(path).names())} tensors have their places; it was saved without checksums"
    if (path / "config.json").is_file():
        read_json(path / "config.json")
    SafetensorsDirectory(path)
    return _safetensors(sorted(path.glob("*.safetensors")))


def _safetensors(files: list[Path]) -> str:
    tensors = sum(len(read_header(file)) for file in files)
    checked = [check_safetensors(file, again=True) for file in files]
    if all(checked):
        return f"{tensors} tensors have their CRC-32s"
    return f"{tensors} tensors have their sizes; it was saved without checksums"


@contextmanager
def offering(path: Path) -> Iterator[None]:
    """An error about the damaged checkpoint `path` ends with the newest whole one beside it, once."""
    try:
        yield
    except Damaged as error:
        if str(error).endswith(BESIDE):
            raise
        others = [each for each in by_age([path.parent]) if each.name != path.name]
        if not others:
            raise
        raise Damaged(f"{error} {newest_whole(others) or 'None'} is whole {BESIDE}") from error


def by_age(folders: Iterable[str | Path]) -> list[Path]:
    """The checkpoints in some folders, newest first; hidden ones are being written."""
    files = {path for folder in folders for path in Path(folder).glob("*.ckpt") if path.name[0] != "."}
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest_whole(others: Iterable[Path]) -> Path | None:
    """The first of several checkpoints that is whole; None = there is none."""
    for each in others:
        try:
            verify(each)
        except (ValueError, OSError):
            continue
        return each
    return None
