"""Hashes that say what a result was made with, in place of paths."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flashar_pl.files import digest


def path_digest(path: str | Path) -> str:
    """sha256 of a file, or of the names and hashes of a directory's files, model cards and hidden files left out."""
    place = Path(path).expanduser()
    if place.is_file():
        return digest(place)
    names = {file: str(file.relative_to(place)) for file in sorted(place.rglob("*")) if file.is_file()}
    hidden = {file for file, name in names.items() if name.startswith(".") or "/." in name or file.suffix == ".md"}
    listed = {name: digest(file) for file, name in names.items() if file not in hidden}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with hashes in place of paths."""
    identity = dict(config)
    for key in ("weights", "settings"):
        value = config.get(key)
        if isinstance(value, str) and Path(value).expanduser().exists():
            identity[key] = f"sha256:{path_digest(value)}"
    return identity


def difference(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What this run has otherwise than a stored one, in words; None = nothing."""
    for key, value in json.loads(json.dumps(now)).items():
        if stored.get(key) != value:
            return f"{key} {stored.get(key)!r}, this run has {value!r}; give the old settings to continue"
    return None
