"""A mark under what this user's own commands wrote, by which a later command knows it from a stranger's file.

It is an HMAC over the text, with a random key that every user has one of.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

MARK = "# flashar mark: "
"""Begins the last line of a marked text, a comment in YAML."""
BYTES = 32
"""Length of a key."""


def key_file() -> Path:
    """Where this user's key is: below $XDG_STATE_HOME, or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flashar" / "key"


def marked(text: str) -> str:
    """A text with the mark, or as it is where the key cannot be kept, as in a home that cannot be written."""
    key = _key(make=True)
    return text if key is None else f"{text}{MARK}{_mark(key, text)}\n"


def own(text: str) -> str | None:
    """A marked text without the mark; None = it has none, or another user's."""
    body, _, mark = text.rpartition(MARK)
    key = _key()
    if key is None or not hmac.compare_digest(_mark(key, body).encode(), mark.strip().encode()):
        return None
    return body


def sign(path: str) -> str | None:
    """The mark of a path that this user's command writes into a checkpoint; None where the key cannot be kept."""
    key = _key(make=True)
    return None if key is None else _mark(key, f"path {path}")


def signed(path: str, mark: object) -> bool:
    """Whether `sign` made the mark of a path, with this user's key."""
    key = _key()
    if key is None or not isinstance(mark, str):
        return False
    return hmac.compare_digest(_mark(key, f"path {path}").encode(), mark.encode(errors="backslashreplace"))


def _mark(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(errors="surrogateescape"), "sha256").hex()


def _key(make: bool = False) -> bytes | None:
    """This user's key. None = there is none, or it cannot be read."""
    try:
        file = key_file()
        if make and not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(secrets.token_bytes(BYTES))
        key = file.read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return key if len(key) == BYTES else None
