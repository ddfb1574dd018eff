"""Reads published tokenizer files: weights (safetensors or torch) and settings (JSON or YAML). Nothing is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def require_file(path: str | Path | None, what: str, advice: str) -> Path:
    """`path` as a Path, or a ValueError that says which file is wanted and where to get it."""
    if path is None:
        raise ValueError(f"no {what} was given. {advice}")
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a directory, not" if file.is_dir() else "does not exist; expected"
        raise ValueError(f"{file} {kind} a {what}. {advice}")
    return file


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch file, which may hold them under "model" or "state_dict".

    Torch files are read with weights_only=True, so no code in them runs. Raises ValueError for anything else.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is no torch file of plain tensors ({reason}). If you trust it, load it once yourself and store "
            "its state dict with torch.save({'model': state_dict}, FILE)."
        ) from error
    return unwrap(content, str(path))


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A ValueError of what is inside names the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def unwrap(content: Any, source: str = "the state dict") -> dict[str, Tensor]:
    """A state dict given bare, or under "model" (LlamaGen) or "state_dict" (Lightning)."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds {type(content).__name__}, expected a non-empty mapping of names to tensors.")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}). Was the download complete?") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as {path.suffix.lstrip('.') or 'YAML'}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected a mapping of settings.")
    return content
