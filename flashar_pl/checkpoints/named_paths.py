"""Paths that a checkpoint names: opened where this user's own command wrote them, or where they lie inside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

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


def inside(checkpoint: Path, name: str) -> str | None:
    """Where a relative path lies inside the directory of a checkpoint, or that of a checkpoint file; else None.

    Links count by where they lead: out of the directory only to where those of the checkpoint's own files lead, as in
    a cache of the Hub.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    file = folder / "config.json" if checkpoint.is_dir() else checkpoint
    found = (folder / name).resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts or not found.exists():
        return None
    if any(root in found.parents for root in (folder.resolve(), file.resolve().parent)):
        return str((folder / name).absolute())
    return None


def refusal(checkpoint: str, what: str, path: str, option: str) -> ValueError:
    """That a path is not opened, and what to type."""
    return ValueError(
        f"{checkpoint} names {path!r} as its {what}. Your own commands did not write that, and of other checkpoints "
        f"only what lies inside their directory is opened. If you trust it, add {option}."
    )


def typed_tokenizer(config: dict[str, Any]) -> str:
    """A tokenizer's configuration as an option."""
    kind, weights = config.get("kind"), config.get("weights")
    text = f"{kind}:{weights}" if config.keys() == {"kind", "weights"} else json.dumps(config)
    return f"--tokenizer {shlex.quote(text)}"
