"""Files that appear complete or not at all, digests, and readers that run nothing a file says.

Standard library only at module level: every `--help` imports this file.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.integrity import check_safetensors, check_torch_file, is_archive, records, view, zip_entries

if TYPE_CHECKING:
    import numpy as np


FULL = (errno.ENOSPC, errno.EDQUOT)
TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""In what torch says where its file cannot be written, whatever the reason."""
WAITS = (10, 30, 60, 120, 300)
"""Seconds between attempts to write a checkpoint to a full disk."""

# --- writing ---------------------------------------------------------------------------------------------------------


def require_new(path: str | Path, what: str) -> Path:
    """`path`, if nothing is there yet and it can be made. Raises ValueError otherwise, before the work is done."""
    target = Path(path)
    if target.exists():
        raise ValueError(f"{target} exists; the {what} would overwrite it. Choose another --out or remove it.")
    there = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"the {what} cannot be written to {target}: {error.strerror or error} ({there}). Choose another --out."
        ) from error
    return target


def _part(target: Path) -> Path:
    """The temporary name beside `target`; no reader takes a hidden name for a result."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while a Ctrl-C was being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def naming_full_disk(target: Path) -> Iterator[None]:
    """What writers raise where a disk is full, each its own way, as an OSError that names the file."""
    try:
        yield
    except Exception as error:
        text = str(error)
        writer = isinstance(error, RuntimeError) and any(mark in text for mark in TORCH_WRITER)
        if interrupted(error):
            raise
        if (isinstance(error, OSError) and error.errno in FULL) or writer or "No space left" in text:
            code = (isinstance(error, OSError) and error.errno) or errno.ENOSPC
            raise OSError(code, os.strerror(code), str(target)) from error
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes otherwise.

    What stood at `path` stays until then. The content is on the disk before the name is.
    """
    target = Path(path)
    part = _part(target)
    try:
        with naming_full_disk(target):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | Path, what: str) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        ValueError: `path` exists.
    """
    target = require_new(path, what)
    part = _part(target)
    part.mkdir()
    try:
        with naming_full_disk(target):
            yield part
        require_new(target, what)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def patiently(write: Callable[[], object]) -> None:
    """Call `write`, again after each of `WAITS` seconds while the disk is full. OSError if it still is then."""
    for seconds in WAITS:
        try:
            write()
            return
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(f"flashar: {error}; trying again in {seconds:.0f} s.", file=sys.stderr, flush=True)
            time.sleep(seconds)
    write()


def exchange(new: Path, target: Path) -> None:
    """Let the directory `new` change places with `target`, in one step of the file system where Linux has one.

    If there is nothing at `target`, it is a renaming. Elsewhere than on Linux, and on file systems without that step,
    there is nothing at `target` for a moment; a process killed in it leaves both whole beside its place.
    """
    if not target.exists():
        new.rename(target)
        return
    if not _exchanged(new, target):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
        old.rename(new)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether renameat2 let two paths change places."""
    import ctypes

    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchanging) == 0


def write_text(path: str | Path, text: str) -> Path:
    """Write a file, complete or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")
    return Path(path)


def write_json(path: str | Path, values: Any) -> Path:
    """Write a JSON file, complete or not at all. Raises ValueError as `json_text`."""
    return write_text(path, json_text(values, path) + "\n")


def json_text(values: Any, what: object) -> str:
    """JSON of plain values. ValueError naming the entry of `what` for a number that JSON does not have."""
    try:
        return json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        found = next(_not_finite(values), str(error))
        raise ValueError(f"{what} cannot be written: {found}; JSON holds finite numbers only.") from error


def _not_finite(values: Any, at: str = "") -> Iterator[str]:
    """'KEY.KEY is nan' for every number in plain values that is not finite."""
    if isinstance(values, float) and not math.isfinite(values):
        yield f"{at or 'it'} is {values}"
    elif isinstance(values, dict | list | tuple):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in pairs:
            yield from _not_finite(value, f"{at}.{key}" if at else str(key))


# --- reading text ----------------------------------------------------------------------------------------------------

BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
    *(LookupError, TypeError, ValueError, AttributeError, AssertionError, SyntaxError, ArithmeticError, MemoryError),
    struct.error,
)
"""What readers raise for a damaged or foreign file. torch's unpickler has no error type of its own; numpy's reader
of headers raises SyntaxError or tokenize.TokenError, as the version of Python has it; RecursionError is a RuntimeError,
UnicodeDecodeError a ValueError."""
DEEPEST = 100
"""Levels of nesting in a text file; no file of ours has ten."""
MOST_NODES = 100_000
"""Values in a YAML file, those that an alias repeats counted again."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins, which stands for a file that was not downloaded."""


def need_file(path: str | Path) -> Path:
    """`path`, if it is a file with its content. ValueError otherwise, also for a Git LFS pointer."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is a directory; expected a file." if file.is_dir() else f"no file {file}.")
    with file.open("rb") as stream:
        _no_pointer(file, stream.read(len(POINTER)))
    return file


def _no_pointer(path: str | Path, begin: bytes) -> None:
    if begin.startswith(POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")


def read_text(path: str | Path, content: bytes | None = None) -> str:
    """A text file in UTF-8, with or without a byte order mark. ValueError names file and line.

    content: the file's bytes where they are in memory already; `path` is then a name for messages.
    """
    data = need_file(path).read_bytes() if content is None else content
    _no_pointer(path, data[: len(POINTER)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text."
        ) from error


def read_lines(path: str | Path, content: bytes | None = None) -> list[tuple[int, str]]:
    """(number, line) of the lines of a text file that are not blank, without space around them, counted from 1.

    Only \\n ends a line: other separators of Unicode are part of a caption or a prompt.
    """
    lines = enumerate(read_text(path, content).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """Values of JSON text. ValueError names the file and the line for what is not strict JSON, or nested too deep.

    line: at which the text begins in the file.
    """
    try:
        values = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON: {found}.") from error
    except BROKEN as error:
        raise ValueError(f"{path}, line {line}: not JSON that can be read: {_without_advice(error)}.") from error
    level = [values]
    for _ in range(DEEPEST):
        level = [each for held in level if isinstance(held, dict | list) for each in _children(held)]
        if not level:
            return values
    raise ValueError(f"{path}, line {line}: nested deeper than {DEEPEST} levels.")


def _children(held: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits[:40])


def _without_advice(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "it does not fit in memory" if isinstance(error, MemoryError) else str(error)


def read_json(path: str | Path, content: bytes | None = None) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming file and line where it is missing, damaged, or no object."""
    values = parse_json(read_text(path, content), path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


def read_yaml(path: str | Path, content: bytes | None = None) -> Any:
    """Values of a YAML file: plain types only. ValueError names the file, and the line where YAML has it.

    Aliases count as what they stand for, so that a file of a few lines cannot stand for 10^9 values.
    """
    return parse_yaml(read_text(path, content), path)


def parse_yaml(text: str, path: str | Path) -> Any:
    """`read_yaml` of text in memory; `path` is a name for messages."""
    import yaml

    class Bounded(yaml.SafeLoader):
        """Counts what it composes."""

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.nodes = self.depth = 0
            self.sizes: dict[int, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias, before = self.check_event(yaml.AliasEvent), self.nodes
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it is nested deeper than {DEEPEST} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and id(node) not in self.sizes:
                raise ValueError("an alias stands for what it is part of")
            self.nodes += self.sizes[id(node)] if alias else 1
            if self.nodes > MOST_NODES:
                raise ValueError(f"with its aliases it stands for more than {MOST_NODES:,} values")
            self.sizes.setdefault(id(node), self.nodes - before)
            return node

    try:
        return yaml.load(text, Loader=Bounded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{place}: not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, *BROKEN) as error:
        text = " ".join(_without_advice(error).split())[:200]
        raise ValueError(f"{path} is not YAML that can be read: {text}.") from error


# --- reading tensors and arrays --------------------------------------------------------------------------------------


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_torch(path: str | Path, content: bytes | None = None, mmap: bool = False) -> Any:
    """What a torch file holds, on the CPU, without running code from it: tensors and plain values.

    content: the file's bytes where they are in memory already; `path` is then a name for messages.
    mmap: leave the tensors on the disk until they are used.

    Raises:
        ValueError: no such file, damaged (see `check_torch_file`), or holding anything else.
    """
    import torch

    source: Any = io.BytesIO(content) if content is not None else need_file(path)
    if content is None:
        check_torch_file(source)
    try:
        _no_announced_bytes(source)
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files store their arguments so
            mmap = mmap and is_archive(source)
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        for tensor in _tensors_in(found):
            if tensor.nbytes > SMALL + tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has fewer values in the file")
        return found
    except BROKEN as error:
        raise ValueError(f"{path} is not a torch file that can be read safely: {reason(error)}") from error


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


def read_tensors(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Content of a .pt/.pth/.ckpt/.safetensors file, on the CPU, without running code from it; mmap as in `read_torch`.

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
    content = read_torch(file, mmap=mmap)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a checkpoint, which is a dictionary.")
    return content


def reason(error: BaseException) -> str:
    """What a reader found, without torch's advice to read the file unsafely."""
    text = " ".join(str(error).split())
    if "PytorchStreamReader" in text:
        return "the file is truncated or damaged"
    if isinstance(error, LookupError | EOFError):
        return "it is no torch file, or a part of one"
    if isinstance(error, RecursionError | MemoryError):
        return _without_advice(error)
    if "allow_pickle" in text or "contains pickled" in text:
        return "it holds Python objects, which are never read"
    _, unpickler, found = text.partition("WeightsUnpickler error:")
    text = found.split(" Please use")[0].split(" Check the documentation")[0] if unpickler else text
    return f"{type(error).__name__}: {text.strip()[:200]}".rstrip(": ")


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


def array_header(stream: Any, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of the .npy file that begins in `stream` and has `size` bytes; nothing is allocated for it.

    Raises an error of `BROKEN` for what is no such file, holds Python objects, or announces more than its size.
    """
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has version {version[0]}.{version[1]} of the .npy format; expected 1.0 or 2.0")
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never read")
    if any(type(n) is not int or n < 0 for n in shape) or stream.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"it has {size:,} bytes and announces an array of shape {shape} and type {dtype}")
    return shape, dtype


# --- words -----------------------------------------------------------------------------------------------------------


def closest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest known names, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
