"""Whether a file still is what was written: checksums that are kept with it and compared before it is used.

A torch file is a zip archive with a CRC-32 of every tensor, which torch writes and does not compare. A safetensors file
of ours has them in the metadata of its header. A sharded checkpoint has a list, `digests.json`, with the CRC-32 of
every 16 MiB of every file. CRC-32, not SHA-256: it finds damage,
which is all that is asked of it (whoever forges a file forges its digest), at several times the speed; what it costs
says docs/training.md. A few threads read the pieces, which then lie in memory when the file is read for use.

Standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flashar_pl.text_files import need_file

CRC_KEY, BESIDE_KEY = "crc32", "crc32.beside"
"""Of the metadata of a safetensors file."""
LIST = "digests.json"
PIECE, CHUNK = 16 * 2**20, 2**18
"""Bytes of a file that have a CRC-32 of their own, and that are read at once."""
SWITCH = "FLASHAR_NO_VERIFY"
"""Environment variable that switches the comparison off, as `flashar ... --no-verify` does, also for other ranks."""
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
ADVICE = "Copy or download it again; --no-verify reads it as it is."


class Damaged(ValueError):
    """A file is not what was written."""


class Piece(NamedTuple):
    """A run of bytes and their CRC-32."""

    name: str
    """For messages."""
    begin: int
    end: int
    crc: int


_whole: set[tuple[str, int, int, int]] = set()
"""Files that this process has found whole: what a fit opens five times is read once."""


def _identity(path: Path) -> tuple[str, int, int, int]:
    about = path.stat()
    return str(path.resolve()), about.st_ino, about.st_size, about.st_mtime_ns


def check_torch_file(path: Path, again: bool = False, tensors: bool = True) -> None:
    """Compare the records of a torch file with their CRC-32. Raises Damaged naming the first that differs.

    again: also if this process has done so before, or is told not to. tensors: False leaves them for when they are
    used (`tensor_crcs`). Files of before 2020, which are no archives, and those that were saved without CRC-32 are not
    compared.
    """
    if _settled(path, again):
        return
    if not is_archive(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise Damaged(f"{path} is damaged or cut off: its list of tensors is not at its end. {ADVICE}")
        return
    entries = zip_entries(path, path)
    if not have_crcs(entries):
        return
    with view(path) as content:
        pieces = list(records(path, content, [each for each in entries if tensors or not _is_tensor(each)]))
    _compare(path, pieces, whole=tensors)


def tensor_crcs(path: Path) -> set[tuple[int, int]] | None:
    """(bytes, CRC-32) of every tensor of a torch file; None = it has none, or they need not be compared again."""
    if _settled(path, False) or not is_archive(path):
        return None
    entries = zip_entries(path, path)
    return {(each.file_size, each.CRC) for each in entries if _is_tensor(each)} if have_crcs(entries) else None


def _is_tensor(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.rpartition("/")[0].endswith("/data")


def have_crcs(entries: list[zipfile.ZipInfo]) -> bool:
    """Whether an archive was written with CRC-32s."""
    return any(each.CRC for each in entries)


def is_archive(source: Any) -> bool:
    """Whether a file, or its bytes, end as a zip archive does."""
    try:
        return zipfile.is_zipfile(source)
    except zipfile.BadZipFile:
        return True


def zip_entries(path: str | Path, source: Any) -> list[zipfile.ZipInfo]:
    """What an archive lists. Raises Damaged for other than uncompressed entries that the file has room for.

    path: for messages. source: the file or its bytes.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            size = archive.start_dir
    except (zipfile.BadZipFile, struct.error, ValueError, LookupError, NotImplementedError, EOFError, OSError) as error:
        raise Damaged(f"{path} is damaged: its list of tensors cannot be read ({error}). {ADVICE}") from error
    if packed := [each.filename for each in entries if each.compress_type != zipfile.ZIP_STORED]:
        raise Damaged(f"{path} is no torch file: {packed[0]} in it is compressed.")
    if sum(each.file_size for each in entries) > size:
        raise Damaged(f"{path} is damaged: its tensors have more bytes than the file. {ADVICE}")
    return entries


def records(path: str | Path, content: memoryview, entries: Iterable[zipfile.ZipInfo]) -> Iterator[Piece]:
    """Where the entries of an uncompressed archive lie in its bytes."""
    for each in entries:
        head = bytes(content[each.header_offset : each.header_offset + 30])
        begin = each.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        end = begin + each.file_size
        if head[:4] != b"PK\x03\x04" or end > len(content):
            raise Damaged(f"{path} is damaged: {each.filename} is not where its list of tensors says. {ADVICE}")
        yield Piece(each.filename, begin, end, each.CRC)


def crc_metadata(tensors: Mapping[str, Any], beside: Iterable[Path] = ()) -> dict[str, str]:
    """Metadata for the header of a safetensors file: CRC-32 of the bytes of every tensor, given as arrays of bytes.

    beside: text files of the same directory. They may be edited, so a difference is said, and is no error.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        crcs = dict(zip(tensors, pool.map(zlib.crc32, tensors.values()), strict=True))
    texts = {path.name: zlib.crc32(path.read_bytes()) for path in beside}
    return {CRC_KEY: json.dumps(crcs), BESIDE_KEY: json.dumps(texts)}


def check_safetensors(path: Path, again: bool = False) -> bool:
    """Compare the tensors of a safetensors file with the CRC-32s in its header, if it has them, which is returned.

    Raises Damaged naming the first that differs. again: as in `check_torch_file`.
    """
    if _settled(path, again):
        return False
    with view(need_file(path)) as content:
        begin = 8 + int.from_bytes(content[:8], "little")
        try:
            header = json.loads(bytes(content[8:begin]))
            kept = header.pop("__metadata__", {})
            crcs, texts = json.loads(kept.get(CRC_KEY, "{}")), json.loads(kept.get(BESIDE_KEY, "{}"))
            odd = [name for name, crc in texts.items() if _text_differs(path.with_name(name), crc)]
            places = {name: each["data_offsets"] for name, each in header.items()}
            pieces = [Piece(name, begin + at[0], begin + at[1], crcs[name]) for name, at in places.items() if crcs]
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Damaged(
                f"{path} is not a safetensors file, or is damaged at its beginning ({error}). {ADVICE}"
            ) from error
    for name in odd:
        print(f"{path.with_name(name)} is not what was written with {path.name}: edited, or damaged.", file=sys.stderr)
    _compare(path, pieces)
    return bool(crcs)


def _text_differs(path: Path, crc: int) -> bool:
    return path.is_file() and zlib.crc32(path.read_bytes()) != crc


def write_list(directory: Path, digests: dict[str, list[int]]) -> None:
    """Write the list of a directory. digests: of its files, as `file_digests` gives them."""
    sizes = {name: (directory / name).stat().st_size for name in digests}
    files = {name: {"size": sizes[name], "crc32": [f"{crc:08x}" for crc in digests[name]]} for name in sorted(digests)}
    with (directory / LIST).open("w", encoding="utf-8") as file:
        json.dump({"format": 1, "piece": PIECE, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def file_digests(path: Path) -> list[int]:
    """CRC-32 of every piece of a file."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        places = range(0, path.stat().st_size, PIECE)
        return list(pool.map(lambda begin: _crc(file.fileno(), begin, begin + PIECE), places))


def listed(directory: Path) -> dict[str, Any] | None:
    """File name -> its size and CRC-32s, as the list of a directory has them; None = it has no list."""
    path = directory / LIST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        files = {
            name: (int(each["size"]), [int(crc, 16) for crc in each["crc32"]])
            for name, each in content["files"].items()
        }
        if content["format"] != 1 or content["piece"] != PIECE or any(Path(name).name != name for name in files):
            raise ValueError("another format")
        if any(len(crcs) != -(-size // PIECE) for size, crcs in files.values()):
            raise ValueError("a file has another number of pieces than its size says")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Damaged(
            f"{path} is damaged ({error}). Copy the directory again; --no-verify reads it as it is."
        ) from error
    return files


def check_directory(directory: Path, names: Iterable[str] | None = None, again: bool = False) -> bool:
    """Compare the files of a directory with its list; whether it has one. Raises Damaged naming the file and the place.

    names: of the files to compare; None = all. again: as in `check_torch_file`.
    """
    if not again and os.environ.get(SWITCH):
        return False
    files = listed(directory)
    if files is None:
        return False
    for name in files if names is None else names:
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{directory} is incomplete: {name} is missing. {ADVICE}")
        if name not in files:
            raise Damaged(f"{path} is not in {LIST}: it belongs to another checkpoint. {ADVICE}")
        size, crcs = files[name]
        if path.stat().st_size != size:
            raise Damaged(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes and was written with {size:,}. {ADVICE}"
            )
        if _settled(path, again):
            continue
        pieces = [
            Piece(f"MiB {i * 16} to {i * 16 + 16}", i * PIECE, (i + 1) * PIECE, crc) for i, crc in enumerate(crcs)
        ]
        _compare(path, pieces)
    return True


def _settled(path: Path, again: bool) -> bool:
    return not again and (bool(os.environ.get(SWITCH)) or _identity(path) in _whole)


@contextmanager
def view(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, read when they are looked at."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            yield view


def _crc(file: int, begin: int, end: int) -> int:
    """CRC-32 of some bytes of an open file; read, not mapped, since pages that are mapped hinder the other readers."""
    crc = 0
    while begin < end and (data := os.pread(file, min(CHUNK, end - begin), begin)):
        crc, begin = zlib.crc32(data, crc), begin + len(data)
    return crc


def _compare(path: Path, pieces: list[Piece], whole: bool = True) -> None:
    """Compare pieces of a file, and remember it if they are the whole of it and as they were written."""
    identity = _identity(path)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        each = pool.map if sum(piece.end - piece.begin for piece in pieces) > CHUNK else map  # threads for large files
        found = each(lambda piece: _crc(file.fileno(), piece.begin, piece.end), pieces)
        different = [piece for piece, crc in zip(pieces, found, strict=True) if crc != piece.crc]
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise Damaged(f"{path} is damaged: {different[0].name}{more} is not what was written. {ADVICE}")
    if whole:
        _whole.add(identity)
