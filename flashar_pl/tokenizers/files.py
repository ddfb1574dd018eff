"""Published tokenizer files: where they are, and their settings (JSON or YAML)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flashar_pl.renames import AVERAGED
from flashar_pl.tensor_files import read_tensors
from flashar_pl.text_files import read_yaml

RECIPE_WEIGHTS = {131072: "weights/Emu3.5-VisionTokenizer", 16384: "weights/vq_ds16_c2i.pt"}
"""Number of codes -> the published tokenizer that has them, where the recipes of experiments/ expect it."""


def require_file(path: str | Path | None, what: str, advice: str) -> Path:
    """`path` as a Path, or a ValueError that says which file is wanted and where to get it."""
    if path is None:
        raise ValueError(f"no {what} was given. {advice}")
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a directory, not" if file.is_dir() else "does not exist; expected"
        raise ValueError(f"{file} {kind} a {what}. {advice}")
    return file


def read_weights(file: Path) -> dict[str, Any]:
    """Content of a weights file, left on the disk until it is used; says so where there are averaged weights."""
    content = read_tensors(file, mmap=True)
    if AVERAGED in content:
        print(f"{file}: its averaged weights (ema) are taken.", file=sys.stderr)
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML)."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected a mapping of settings.")
    return content
