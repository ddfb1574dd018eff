"""Paths that a checkpoint or a manifest names: opened where this user's own command wrote them, or where they lie
beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashar_pl.mark import sign, signed

IN_TOKENIZER = ("weights", "settings")
IN_VALIDATION = ("features", "reference")


def named_paths(tokenizer: dict[str, Any] | None, training: dict[str, Any]) -> set[str]:
    """What a description names as files of a tokenizer, of prompts and of a validation."""
    settings = training.get("settings")
    validation = settings.get("validation") if isinstance(settings, dict) else None
    found = [training.get("prompts")]
    for values, names in ((tokenizer, IN_TOKENIZER), (validation, IN_VALIDATION)):
        found += [values.get(name) for name in names] if isinstance(values, dict) else []
    return {value for value in found if isinstance(value, str)}


def marks(paths: Iterable[str]) -> dict[str, str]:
    """Marks of paths that are this user's, to be stored where they are named."""
    return {path: mark for path in sorted(paths) if (mark := sign(path)) is not None}


def strange(paths: Iterable[str], stored: dict[str, Any]) -> frozenset[str]:
    """Those of some paths that are not this user's, by the stored marks."""
    return frozenset(path for path in paths if not signed(path, stored.get(path)))


def inside(file: Path, name: str) -> str | None:
    """Where a relative path lies inside the directory of the file that names it; else None.

    Links count by where they lead: out of the directory only to where that of the file itself leads, as in a cache of
    the Hub.
    """
    folder = file.parent
    try:
        found = (folder / name).resolve()
        if Path(name).is_absolute() or ".." in Path(name).parts or not found.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # a name that no file system takes, a loop of links
        return None
    if any(root in found.parents for root in (folder.resolve(), file.resolve().parent)):
        return str((folder / name).absolute())
    return None


def all_inside(file: Path, names: Iterable[str]) -> dict[str, str]:
    """Of some names those that are `inside`, and where they lie."""
    return {name: place for name in names if (place := inside(file, name)) is not None}


def located(tokenizer: dict[str, Any], found: dict[str, str]) -> dict[str, Any]:
    """A tokenizer's configuration with its files where they were found."""
    return tokenizer | {key: found[name] for key in IN_TOKENIZER for name in found if tokenizer.get(key) == name}


def refusal(file: str, what: str, path: str, advice: str) -> ValueError:
    """That a path is not opened, and what to type."""
    return ValueError(
        f"{file} names {path!r} as its {what}. It bears no mark of yours: another user or an earlier version wrote "
        "it, or your home cannot be written. Then only what lies inside its directory is opened. If you trust it, "
        f"{advice}."
    )


def typed_tokenizer(config: dict[str, Any]) -> str:
    """A tokenizer's configuration as an option."""
    kind, weights = config.get("kind"), config.get("weights")
    text = f"{kind}:{weights}" if config.keys() == {"kind", "weights"} else json.dumps(config)
    return f"--tokenizer {shlex.quote(text)}"
