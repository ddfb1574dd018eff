"""Locks between processes, on open files. On Windows and on file systems without locks they keep nobody out."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of `os.open` that Windows has not."""


def lock_file(path: str | Path) -> IO[str]:
    """Open a file to be locked, made if needed, as it is. Raises ValueError for a link, which may lead to any file."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666), "r+")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link; expected a file, which this command locks. Remove it.") from error


def _fcntl() -> ModuleType | None:
    """None where the system has none: Windows."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def take(file: Any, *, wait: bool = False, alone: bool = False) -> None:
    """Lock an open file, or its descriptor.

    alone: this process has the lock, whichever of its threads asks, and its children have not: those that outlive it
    do not hold it. Otherwise whoever has the file open has it, until `release`.

    Raises:
        BlockingIOError: another one has it, and `wait` is false.
    """
    if (fcntl := _fcntl()) is None:
        return
    call = fcntl.lockf if alone else fcntl.flock
    try:
        call(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either for lockf
        raise BlockingIOError(*error.args) from error
    except OSError:  # a file system without locks
        pass


def release(file: Any) -> None:
    """Let go of a lock; closing does not do it while a forked process has the file open too."""
    if (fcntl := _fcntl()) is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
