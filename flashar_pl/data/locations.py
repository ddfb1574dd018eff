"""Where shards lie: a local directory, a URL that fsspec knows, or a `pipe:` command.

A location that is not local is copied shard by shard into a cache directory when a shard is first needed, checked
against its hash there, and read from the copy.

    data/digits                                   a directory
    s3://bucket/digits, https://host/digits       any fsspec URL
    pipe:ssh host cat /data/digits/{path}         a shell command that writes the file {path} to its output
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec

from flashar_pl.files import digest, replacing

CHUNK = 1 << 20


def is_remote(location: str) -> bool:
    """True for a URL or a `pipe:` command."""
    return location.startswith("pipe:") or "://" in location


def default_cache() -> Path:
    """Where copies are kept unless another directory is given: $XDG_CACHE_HOME/flashar_pl or ~/.cache/flashar_pl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashar_pl"


def read_bytes(location: str, path: str) -> bytes:
    """A whole file of a remote location. Raises ValueError if it cannot be read."""
    return b"".join(_chunks(location, path))


def fetch(location: str, path: str, sha256: str, cache: Path) -> Path:
    """The local copy of a remote file; processes of one machine that want the same file wait for one another.

    Args:
        location: URL or `pipe:` command.
        path: of the file below it.
        sha256: of its contents; the copy is named after it.
        cache: directory of the copies.

    Raises:
        ValueError: the file cannot be read, or what arrives has another hash.
    """
    target = cache / f"{sha256}{Path(path).suffix}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with replacing(target) as part:
            with part.open("wb") as file:
                file.writelines(_chunks(location, path))
            if (found := digest(part)) != sha256:
                raise ValueError(
                    f"{path} from {location} has the SHA-256 {found}, the manifest says {sha256}: "
                    "it is damaged or was replaced there."
                )
    return target


def _chunks(location: str, path: str) -> Iterator[bytes]:
    if location.startswith("pipe:"):
        yield from _pipe_chunks(location, path)
        return
    url = f"{location.rstrip('/')}/{path}"
    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"Cannot read {url}: {type(error).__name__}: {error}") from error


def _pipe_chunks(location: str, path: str) -> Iterator[bytes]:
    if "{path}" not in location:
        raise ValueError(
            f"{location!r} lacks {{path}}, the place of the file name, as in pipe:cat /data/digits/{{path}}"
        )
    command = location.removeprefix("pipe:").replace("{path}", shlex.quote(path))
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read(CHUNK):
            yield chunk
    if process.returncode:
        raise ValueError(f"The command `{command}` failed with exit code {process.returncode}.")
