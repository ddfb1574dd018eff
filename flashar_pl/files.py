"""Files that appear complete or not at all, digests, and readers that run nothing a file says.

Standard library only at module level: every `--help` imports this file.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


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


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes otherwise.

    What stood at `path` stays until then. The content is on the disk before the name is.
    """
    target = Path(path)
    part = _part(target)
    try:
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
        yield part
        require_new(target, what)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a file, complete or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")
    return Path(path)


def write_json(path: str | Path, values: Any) -> Path:
    """Write a JSON file, complete or not at all."""
    return write_text(path, json.dumps(values, indent=2) + "\n")


# --- reading ---------------------------------------------------------------------------------------------------------


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file where it is missing, damaged, or no object."""
    file = Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no file {file}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a JSON {type(values).__name__}; expected an object.")
    return values


def read_torch(path: str | Path, content: bytes | None = None, mmap: bool = False) -> Any:
    """What a torch file holds, on the CPU, without running code from it: tensors and plain values.

    content: the file's bytes where they are in memory already; `path` is then a name for messages.
    mmap: leave the tensors on the disk until they are used.

    Raises:
        ValueError: no such file, damaged, or holding anything else.
    """
    import torch

    if content is None and not Path(path).is_file():
        raise ValueError(f"no file {path}.")
    source: Any = path if content is None else io.BytesIO(content)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files store their arguments so
            mmap = mmap and zipfile.is_zipfile(source)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except BROKEN as error:
        raise ValueError(f"{path} is not a torch file that can be read safely: {reason(error)}") from error


def read_tensors(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Content of a .pt/.pth/.ckpt/.safetensors file, on the CPU, without running code from it; mmap as in `read_torch`.

    Raises:
        ValueError: no such file, damaged, holding more than tensors and plain values, or no dictionary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    if file.suffix == ".safetensors" and file.exists():
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a safetensors file, or is cut off: {reason(error)}") from error
    content = read_torch(file, mmap=mmap)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a checkpoint, which is a dictionary.")
    return content


BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
    *(LookupError, TypeError, ValueError, AttributeError, AssertionError, SyntaxError),
)
"""What readers raise for a damaged or foreign file. torch's unpickler has no error type of its own; numpy's reader
of headers raises SyntaxError or tokenize.TokenError, as the version of Python has it."""


def reason(error: BaseException) -> str:
    """What a reader found, without torch's advice to read the file unsafely."""
    text = " ".join(str(error).split())
    if "PytorchStreamReader" in text:
        return "the file is truncated or damaged"
    if isinstance(error, LookupError | EOFError):
        return "it is no torch file, or a part of one"
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
    import numpy as np

    if content is None and not Path(path).is_file():
        raise ValueError(f"no file {path}.")
    try:
        read = np.load(path if content is None else io.BytesIO(content), allow_pickle=False)
        if isinstance(read, np.ndarray):
            return {"array": read}
        with read:
            return {name: read[name] for name in read.files if names is None or name in names}
    except BROKEN as error:
        raise ValueError(f"{path} is not a file of arrays that can be read: {reason(error)}") from error


# --- words -----------------------------------------------------------------------------------------------------------


def closest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest known names, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
