"""Readers of tensors and arrays that run nothing a file says, and take no more memory than it has bytes.

torch, safetensors and numpy are imported where they are used: every `--help` imports this file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import math
import mmap as mappings
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.integrity import (
    ADVICE,
    CHUNK,
    THREADS,
    Damaged,
    check_safetensors,
    check_torch_file,
    crc_metadata,
    is_archive,
    records,
    view,
    zip_entries,
)
from flashar_pl.text_files import BROKEN, need_file, no_pointer, reason

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, UntypedStorage

META, INDEX = "meta.pt", ".metadata"
"""Of a sharded checkpoint, a directory: everything but tensors, plain types; torch's list of its tensors."""


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is a sharded checkpoint."""
    return (Path(path) / META).is_file() and (Path(path) / INDEX).is_file()


def read_torch(path: str | Path, content: bytes | None = None, mmap: bool = False, whole: bool = True) -> Any:
    """What a torch file holds, on the CPU, without running code from it: tensors and plain values.

    content: the file's bytes where they are in memory already; `path` is then a name for messages.
    mmap: leave the tensors on the disk until they are used. whole: compare all of them with their CRC-32s; else
    `copied` compares those that are used.

    Raises:
        ValueError: no such file, damaged (see `check_torch_file`), or holding anything else.
    """
    import torch

    source: Any = io.BytesIO(content) if content is not None else need_file(path)
    if content is None:
        check_torch_file(source, tensors=whole)
    else:
        no_pointer(path, content)
    try:
        _no_announced_bytes(source)
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files store their arguments so
            mmap = mmap and is_archive(source)
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        for tensor in _tensors_in(found):
            tensor.on_disk = mmap
            if tensor.nbytes > SMALL + tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has fewer values in the file")
        return found
    except BROKEN as error:
        raise ValueError(f"{path} is not a torch file that can be read safely: {reason(error)}") from error


def drop_pages(tensor: Any) -> None:
    """Give back the memory of a tensor that `read_torch` left on the disk; it is read again when it is used.

    What a process has read of a mapped file counts as its memory, and would stand beside every copy.
    """
    if sys.platform != "linux" or not getattr(tensor, "on_disk", False):
        return
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // MAPPED) * MAPPED
    size = (storage.data_ptr() + storage.nbytes()) // MAPPED * MAPPED - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mappings.MADV_DONTNEED)


def _tensors_in(values: Any) -> Iterator[Any]:
    """The tensors in plain values."""
    if hasattr(values, "untyped_storage"):
        yield values
    elif isinstance(values, dict | list | tuple):
        for each in values.values() if isinstance(values, dict) else values:
            yield from _tensors_in(each)


def _no_announced_bytes(source: Path | io.BytesIO) -> None:
    """ValueError for a torch file that makes its reader allocate as many bytes as it says, which no tensor needs."""
    if not is_archive(source):
        return
    with contextlib.nullcontext(source.getbuffer()) if isinstance(source, io.BytesIO) else view(source) as content:
        for each in records("it", content, zip_entries("it", source)):
            if each.name.endswith("data.pkl") and b"bytearray" in bytes(content[each.begin : each.end]):
                raise ValueError("it asks for memory by size")
    if isinstance(source, io.BytesIO):
        source.seek(0)


def read_tensors(path: str | Path, mmap: bool = False, whole: bool = True) -> dict[str, Any]:
    """Content of a .pt/.pth/.ckpt/.safetensors file, on the CPU, without running code from it.

    mmap, whole: as in `read_torch`.

    Raises:
        ValueError: no such file, damaged, holding more than tensors and plain values, or no dictionary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = need_file(path)
    if file.suffix == ".safetensors":
        check_safetensors(file)
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a safetensors file, or is cut off: {reason(error)}") from error
    content = read_torch(file, mmap=mmap, whole=whole)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a checkpoint, which is a dictionary.")
    return content


def read_part(path: str | Path, part: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose names hold `part` at their start or after a dot, by what follows it.

    The others are not read, and these are not compared with checksums.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    file = need_file(path)
    try:
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if f".{part}" in f".{name}"]  # noqa: SIM118 (no mapping)
            return {name.split(part, 1)[1]: content.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file, or is cut off: {reason(error)}") from error


def save_checked(tensors: Mapping[str, Tensor], path: Path, beside: Iterable[Path] = ()) -> None:
    """Write a safetensors file with the CRC-32 of every tensor, and of texts `beside` it, in its header."""
    import torch
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    crcs = crc_metadata({key: tensor.flatten().view(torch.uint8).numpy() for key, tensor in tensors.items()}, beside)
    save_file(tensors, path, metadata={"format": "pt", **crcs})


def read_arrays(
    path: str | Path, content: bytes | None = None, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Arrays of a .npz file by name, or that of a .npy file under "array", without unpickling.

    content: the file's bytes where they are in memory already; `path` is then a name for messages. names: of the arrays
    to read; None = all.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    source: Any = need_file(path) if content is None else io.BytesIO(content)
    size = len(content) if content is not None else Path(path).stat().st_size
    no_pointer(path, content or b"")
    try:
        with _opened(source) as stream:
            if stream.read(2) != b"PK":
                return {"array": _array(stream, size)}
        with zipfile.ZipFile(source) as archive:
            arrays = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            wanted = {name: each for name, each in arrays.items() if names is None or name in names}
            unpacked = sum(each.file_size for each in wanted.values())
            if unpacked > SMALL + LARGEST_RATIO * size:
                raise ValueError(
                    f"{size:,} bytes unpack to {unpacked:,}; save so many equal values with numpy.savez, uncompressed"
                )
            found = {}
            for name, each in wanted.items():
                with archive.open(each) as stream:
                    found[name] = _array(stream, each.file_size)
            return found
    except BROKEN as error:
        raise ValueError(f"{path} is not a file of arrays that can be read: {reason(error)}") from error


SUMS, PAGE = "sums", 4096
"""Key of `page_sums` in a checkpoint of ours, and the bytes that have a sum of their own."""


def page_sums(tensors: Iterable[Tensor]) -> list[list[int]] | None:
    """[bytes, digest] of each tensor, for `copied`, which compares it at several times CRC-32's speed; None where one
    is a part of other memory, as it would be stored with all of that.

    The digest is the CRC-32 of the sums of the 64-bit words of every page, and of the bytes behind the last one. A
    flipped bit changes it, and so do pages that are lost or exchanged; words exchanged within a page do not.
    """
    each = list(tensors)
    if any(not tensor.is_contiguous() or tensor.nbytes != tensor.untyped_storage().nbytes() for tensor in each):
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        return [[tensor.nbytes, digest] for tensor, digest in zip(each, pool.map(_page_sum, each), strict=True)]


def _page_sum(tensor: Tensor) -> int:
    import torch

    content = tensor.detach().reshape(-1).view(torch.uint8)
    whole = len(content) // PAGE * PAGE
    sums = content[:whole].view(torch.int64).view(-1, PAGE // 8).sum(1)  # wraps around, as in `_add`
    return zlib.crc32(content[whole:].cpu().numpy().data, zlib.crc32(sums.cpu().numpy().data))


def _add(piece: np.ndarray, digest: int) -> int:
    """The digest of `page_sums` with more bytes: whole pages, or the last ones."""
    import numpy as np

    whole = len(piece) // PAGE * PAGE
    sums = np.add.reduce(piece[:whole].view(np.uint64).reshape(-1, PAGE // 8), axis=1)
    return zlib.crc32(piece[whole:].data, zlib.crc32(sums.data, digest))


def known_sums(content: Mapping[str, Any]) -> set[tuple[int, int]] | None:
    """(bytes, digest) of the tensors of a checkpoint, as `page_sums` has left them in it; None = it did not."""
    found = content.get(SUMS)
    if not isinstance(found, list) or not all(isinstance(each, list) and len(each) == 2 for each in found):
        return None
    return {(int(size), int(digest)) for size, digest in found if type(size) is type(digest) is int}


def copied(
    path: Path, tensors: dict[str, Any], crcs: set[tuple[int, int]] | None, sums: set[tuple[int, int]] | None = None
) -> dict[str, Tensor]:
    """Copies, in memory, of tensors that `read_torch` left on the disk; those that share memory still do.

    crcs: `tensor_crcs` of the file, with which they are compared while they are copied; None = they are not. sums:
    `known_sums`, which are compared instead where there are any.

    Raises:
        ValueError: one of them is no tensor, or damaged, which is named.
    """
    import torch

    if odd := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path} holds a {type(tensors[odd[0]]).__name__} as {odd[0]}; expected a tensor.")
    owners = {each.untyped_storage().data_ptr(): each for each in tensors.values()}
    known, add = (crcs, zlib.crc32) if crcs is None or sums is None else (sums, _add)
    with ThreadPoolExecutor(THREADS) as pool:
        each = pool.map if sum(each.untyped_storage().nbytes() for each in owners.values()) > CHUNK else map
        copies = dict(zip(owners, each(lambda tensor: _copied(tensor, known, add), owners.values()), strict=True))
    found = {}
    for name, tensor in tensors.items():
        storage = copies[tensor.untyped_storage().data_ptr()]
        if storage is None:
            raise Damaged(f"{path} is damaged: {name} is not what was written. {ADVICE}")
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        found[name] = torch.empty(0, dtype=tensor.dtype).set_(storage, *place)
    return found


def _copied(tensor: Tensor, known: set[tuple[int, int]] | None, add: Callable[..., int]) -> UntypedStorage | None:
    """A copy in memory of a tensor's storage; None = its digest, as `add` makes it, is not among those of the file."""
    import numpy as np
    import torch

    storage = tensor.untyped_storage()
    new = torch.UntypedStorage(storage.nbytes())
    source, target = (torch.empty(0, dtype=torch.uint8).set_(each).numpy() for each in (storage, new))
    digest = 0
    for begin in range(0, len(source), CHUNK):
        piece = target[begin : begin + CHUNK]
        np.copyto(piece, source[begin : begin + CHUNK])
        digest = digest if known is None else add(piece, digest)
    drop_pages(tensor)
    return new if known is None or not len(source) or (len(source), digest) in known else None


MAPPED = mappings.PAGESIZE
"""Bytes of memory that are given back at once."""
SMALL, LARGEST_RATIO = 64 * 2**20, 4
"""Bytes that any file may unpack to, and how many times its own size a larger one may."""


def _opened(source: Any) -> Any:
    return source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)


def _array(stream: Any, size: int) -> np.ndarray:
    """The array of a .npy file of `size` bytes."""
    import numpy as np

    stream.seek(0)
    array_header(stream, size)
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def array_header(stream: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, dtype) of the .npy file that begins in `stream` and has `size` bytes; nothing
    is allocated for it.

    Raises an error of `BROKEN` for what is no such file, holds Python objects, or announces more than its size.
    """
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has version {version[0]}.{version[1]} of the .npy format; expected 1.0 or 2.0")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never read")
    if any(type(n) is not int or n < 0 for n in shape) or stream.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it has {size:,} bytes and announces an array of shape {shape} and type {dtype}")
    return shape, fortran, dtype
