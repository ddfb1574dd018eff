"""Which data module a configuration asks for, and that part of it without the wrapping.

    data: {shards: ..., batch_size: ...}                           CodesDataModule
    data: {class_path: ImageNetDataModule, init_args: {...}}      one of ours by its name, any other by its full path

A parser is built for the class that was found, so keys, values and errors are the same in both forms.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from flashar_pl.training.cli_words import YAML, read_yaml

SHORT_NAMES = {
    "CodesDataModule": "flashar_pl.data.datamodules.CodesDataModule",
    "ImageNetDataModule": "flashar_pl.data.datamodules.ImageNetDataModule",
    "TextImageDataModule": "flashar_pl.data.datamodules.TextImageDataModule",
}
CLASS_WORD, INIT_WORD = "--data.class_path", "--data.init_args."


def choose_data(
    words: list[str], default: type[LightningDataModule], folder: Path
) -> tuple[type[LightningDataModule], list[str]]:
    """The data module class, and the options with every `data` part as the class's own arguments.

    What a file or option names wins over earlier ones; a file's data part for another class is dropped then.

    Args:
        words: options, `--config FILE` pairs first.
        default: the class where none is named.
        folder: where changed copies of files are written.

    Raises:
        ValueError: a class that does not exist or is no data module, or keys beside class_path and init_args.
    """
    chosen = path_of(default)
    named, rest = _named_on_line(words)
    contents: dict[int, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    for i, word in enumerate(rest):
        content = _mapping(word.removeprefix("--config="))
        data = content.get("data")
        if not isinstance(data, dict):
            continue
        if "class_path" in data:
            chosen = _full(data["class_path"])
        contents[i], owners[i] = content, chosen
    chosen = chosen if named is None else _full(named)
    for i, content in contents.items():
        data = content["data"]
        if owners[i] == chosen and "class_path" not in data:
            continue
        copy = folder / f"{i}_{Path(rest[i].removeprefix('--config=')).name}"
        copy.write_text(yaml.safe_dump(content | {"data": _arguments(data) if owners[i] == chosen else {}}), "utf-8")
        rest[i] = f"--config={copy}" if rest[i].startswith("--config=") else str(copy)
    return load_class(chosen), rest


def with_class(config: dict[str, Any], data_class: type, default: type) -> dict[str, Any]:
    """A configuration with `data` wrapped, unless it is for the default class; `choose_data` reads it back."""
    if data_class is default or "data" not in config:
        return config
    return config | {"data": {"class_path": path_of(data_class), "init_args": config["data"]}}


def path_of(data_class: type) -> str:
    """Full import path of a class."""
    return f"{data_class.__module__}.{data_class.__qualname__}"


def load_class(path: str) -> type[LightningDataModule]:
    """The data module class at an import path. Raises ValueError if there is none."""
    module, _, name = path.rpartition(".")
    expected = f"expected one of {', '.join(SHORT_NAMES)}, or the path of a LightningDataModule: package.module.Class"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"data.class_path is {path!r}: {error}; {expected}.") from error
    if not (isinstance(found, type) and issubclass(found, LightningDataModule)):
        raise ValueError(f"data.class_path is {path!r}, which is no data module; {expected}.")
    return found


def _named_on_line(words: list[str]) -> tuple[str | None, list[str]]:
    """The class that an option names, and the other options, with `--data.init_args.X` as `--data.X`."""
    named, rest = None, []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == CLASS_WORD and pending:
            named = pending.pop(0)
        elif word.startswith(f"{CLASS_WORD}="):
            named = word.partition("=")[2]
        else:
            rest.append(f"--data.{word[len(INIT_WORD) :]}" if word.startswith(INIT_WORD) else word)
    return named, rest


def _mapping(word: str) -> dict[str, Any]:
    """The content of a YAML file; {} for any other word."""
    if not word.endswith(YAML) or not Path(word).is_file():
        return {}
    return read_yaml(word)


def _full(name: Any) -> str:
    return SHORT_NAMES.get(name, str(name))


def _arguments(data: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a wrapped data part. Raises ValueError for a part that mixes both forms."""
    beside = sorted(data.keys() - {"class_path", "init_args"})
    if beside:
        raise ValueError(f"data has {', '.join(beside)} beside class_path; put it below data.init_args.")
    return data.get("init_args") or {}
