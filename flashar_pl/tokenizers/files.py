"""Published tokenizer files: where they are, and their settings (JSON or YAML)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def require_file(path: str | Path | None, what: str, advice: str) -> Path:
    """`path` as a Path, or a ValueError that says which file is wanted and where to get it."""
    if path is None:
        raise ValueError(f"no {what} was given. {advice}")
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a directory, not" if file.is_dir() else "does not exist; expected"
        raise ValueError(f"{file} {kind} a {what}. {advice}")
    return file


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A ValueError of what is inside names the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML)."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML or JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected a mapping of settings.")
    return content
