"""Files and directories that appear complete or not at all, and what happens where a disk is full.

Standard library only: every `--help` imports this file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")
"""In what torch says where its file cannot be written, whatever the reason."""
WAITS = (10, 30, 60, 120, 300)
"""Seconds between attempts to write a checkpoint to a full disk."""


def default_cache() -> Path:
    """Where copies and measurements of a machine are kept: $XDG_CACHE_HOME/flashar_pl or ~/.cache/flashar_pl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashar_pl"


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


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """The temporary name beside `target`; no reader takes a hidden name for a result. Folders that are made for it go
    again where nothing comes into them."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target.with_name(f".{target.name}.{os.getpid()}.part")
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while a Ctrl-C was being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def full_disk(error: BaseException, target: Path) -> OSError | None:
    """What a writer raised where a disk is full, each its own way, as an OSError that names the file; None = another
    error."""
    code = error.errno if isinstance(error, OSError) else None
    writer = isinstance(error, RuntimeError) and any(mark in str(error) for mark in TORCH_WRITER)
    if interrupted(error) or not (code in FULL or writer or "No space left" in str(error)):
        return None
    return OSError(code or errno.ENOSPC, os.strerror(code or errno.ENOSPC), str(target))


@contextmanager
def naming_full_disk(target: Path) -> Iterator[None]:
    """Raises `full_disk` for what the block raises, or that itself."""
    try:
        yield
    except Exception as error:
        if (full := full_disk(error, target)) is None:
            raise
        raise full from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes otherwise.

    What stood at `path` stays until then. The content is on the disk before the name is.
    """
    target = Path(path)
    with _part(target) as part:
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
    with _part(target) as part:
        try:
            with naming_full_disk(target):
                part.mkdir()
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


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
