"""Shards are compared with the hashes of their manifest once a run, before a sample of them is used.

A reader hashes a shard when it first needs it, and a thread of each training reader goes through the others meanwhile.
Empty files in a temporary directory mark what is done; the worker processes and devices of a machine share it, so a
machine hashes a shard once.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

from flashar_pl.data.locations import is_remote, locked
from flashar_pl.data.manifest import Manifest, Shard
from flashar_pl.files import digest
from flashar_pl.text_files import need_file


class _Marks:
    """The directory of marks of this process."""

    own: tempfile.TemporaryDirectory | None = None
    path = ""

    @classmethod
    def directory(cls) -> str:
        """Made when first asked for, and removed when the process that made it ends."""
        if not cls.path:
            cls.own = tempfile.TemporaryDirectory(prefix="flashar_pl-", ignore_cleanup_errors=True)
            cls.path = cls.own.name
        return cls.path


def share_marks() -> None:
    """Let the devices of one machine use one directory of marks; every device of a process group must call this."""
    from flashar_pl.ranks import gather  # needs torch, which readers do not

    here = socket.gethostname()
    _Marks.path = next(path for host, path in gather((here, _Marks.directory())) if host == here)


def check_size(path: str, size: int) -> None:
    """Raises ValueError if the shard at `path` is missing or has not `size` bytes."""
    if not os.path.isfile(path):
        raise ValueError(f"The shard {path} is missing: the manifest lists it. Copy it again, or tokenize again.")
    found = os.path.getsize(path)
    if found != size:
        need_file(path)
        raise ValueError(
            f"The shard {path} has {found} bytes, the manifest says {size}: it is truncated or was replaced. "
            "Copy it again, or tokenize the data set again."
        )


def check_hash(manifest: Manifest, shard: Shard, path: str) -> None:
    """Raises ValueError unless the file at `path` has the shard's hash."""
    if (found := digest(path)) != shard.sha256:
        raise ValueError(wrong_hash(manifest, shard, path, found))


def wrong_hash(manifest: Manifest, shard: Shard, path: str, found: str) -> str:
    """What to say of a shard at `path` that has the SHA-256 `found`."""
    every = [other for shards in manifest.splits.values() for other in shards]
    same = next((other.path for other in every if other.sha256 == found), None)
    cause = "it is damaged or was replaced" if same is None else f"it is {same} under another name"
    copied = is_remote(manifest.root) and not is_remote(path)
    advice = "Remove it, and it is copied again." if copied else "Copy it again, or tokenize the data set again."
    return f"The shard {path} has the SHA-256 {found}, the manifest says {shard.sha256}: {cause}. {advice}"


class FirstUse:
    """Compares the shards of a data set with their hashes, each once. Can be sent to worker processes.

    cache: directory for copies of remote shards, None = the user's cache directory.
    """

    def __init__(self, manifest: Manifest, cache: str | None = None) -> None:
        self.manifest, self.cache = manifest, cache
        self._marks = _Marks.directory()
        self._done: set[str] = set()
        self._problem = ""

    def check(self, shards: Iterable[Shard]) -> None:
        """Return when these shards are known to be as the manifest says.

        Raises ValueError if one is not, or if one was not that has been looked at ahead.
        """
        if self._problem:
            raise ValueError(self._problem)
        for shard in shards:
            if shard.path not in self._done:
                self._hash(shard)
                self._done.add(shard.path)

    def check_ahead(self, split: str) -> None:
        """Check the shards of a split in a thread of this process; the next `check` raises what it finds.

        Remote shards are checked as they are copied.
        """
        if not is_remote(self.manifest.root):
            Thread(target=self._ahead, args=(self.manifest.shards(split),), daemon=True).start()

    def _ahead(self, shards: tuple[Shard, ...]) -> None:
        first = os.getpid() % len(shards)  # worker processes begin at different shards
        try:
            self.check(shards[first:] + shards[:first])
        except ValueError as error:
            self._problem = str(error)
        except OSError:  # a reader that needs the shard meets it too
            return

    def _hash(self, shard: Shard) -> None:
        path = self.manifest.local_path(shard, self.cache)
        check_size(path, shard.bytes)
        status = os.stat(path)
        marks = Path(self._marks)
        marks.mkdir(mode=0o700, exist_ok=True)  # a long run's may have been cleared away
        mark = marks / f"{shard.sha256}-{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}"
        with locked(mark.with_suffix(".lock")):
            if not mark.exists():
                check_hash(self.manifest, shard, path)
                mark.touch()
