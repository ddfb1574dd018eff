"""Where shards lie: a local directory, a URL that fsspec knows, or a `pipe:` command.

A location that is not local is copied shard by shard into a cache directory when a shard is first needed, checked
against its hash there, and read from the copy.

    data/digits                                   a directory
    s3://bucket/digits, https://host/digits       any fsspec URL
    pipe:ssh host cat /data/digits/{path}         a shell command that writes the file {path} to its output
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec

from flashar_pl import locks
from flashar_pl.files import digest, replacing


def is_remote(location: str) -> bool:
    """True for a URL or a `pipe:` command."""
    return location.startswith("pipe:") or "://" in location


def address(location: str, path: str) -> str:
    """The URL, `pipe:` command or path of a file at a location. Raises ValueError for a command without {path}."""
    if not location.startswith("pipe:"):
        return f"{location.rstrip('/')}/{path}"
    if "{path}" not in location:
        raise ValueError(
            f"{location!r} lacks {{path}}, the place of the file name, as in pipe:cat /data/digits/{{path}}"
        )
    return location.replace("{path}", shlex.quote(path))


def read_bytes(location: str, path: str) -> bytes:
    """A whole file of a remote location. Raises ValueError if it cannot be read."""
    with tempfile.TemporaryFile() as file:
        _copy(address(location, path), file)
        file.seek(0)
        return file.read()


def fetch(location: str, path: str, sha256: str, cache: Path) -> Path:
    """The copy in `cache` of a remote file; processes of one machine that want the same file wait for one another.

    The copy is named after its hash. Raises ValueError if the file cannot be read, or has another hash.
    """
    target = cache / f"{sha256}{Path(path).suffix}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock")):
        if target.exists():
            return target
        with replacing(target) as part:
            with part.open("wb") as file:
                _copy(address(location, path), file)
            if (found := digest(part)) != sha256:
                raise ValueError(
                    f"{path} from {location} has the SHA-256 {found}, the manifest says {sha256}: "
                    "it is damaged or was replaced there."
                )
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One block at a time among the threads and processes of this machine; the file is only made, never changed."""
    with locks.lock_file(path) as lock:
        locks.take(lock, wait=True)
        try:
            yield
        finally:
            locks.release(lock)


def _copy(url: str, target: IO[bytes]) -> None:
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        if code := subprocess.run(command, shell=True, stdout=target).returncode:
            raise ValueError(f"The command `{command}` failed with exit code {code}.")
        return
    try:
        with fsspec.open(url, "rb") as source:
            shutil.copyfileobj(source, target)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"Cannot read {url}: {type(error).__name__}: {error}") from error
