"""What samples were made with: hashes in place of paths, and a directory that holds samples of one kind only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flashar_pl.files import digest
from flashar_pl.text_files import read_json

SETTINGS = "settings.json"
"""What the samples of a directory depend on."""


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


def check_folder(folder: Path) -> None:
    """ValueError unless a directory of samples is new or was begun by us."""
    if folder.exists() and not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} exists and holds no {SETTINGS}; choose another --out or remove it.")


def check_settings(folder: Path, identity: dict[str, Any]) -> None:
    """ValueError where a directory holds samples of other settings than these."""
    check_folder(folder)
    stored = read_json(folder / SETTINGS) if folder.exists() else {}
    for key, value in json.loads(json.dumps(identity)).items():
        if stored and stored.get(key) != value:
            raise ValueError(
                f"{folder} holds samples drawn with {key} {stored.get(key)!r}, this run has {value!r}; give the old "
                "settings to continue, choose another --out, or remove it."
            )
