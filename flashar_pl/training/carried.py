"""What a checkpoint alone may say about a run: numbers, truth values and known words, never what to import or open."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

from flashar_pl.backbones.registry import FAMILIES
from flashar_pl.training.stored_config import flatten
from flashar_pl.training.words import Words

LONGEST = 200
"""Characters of a stored value that are shown."""
NUMBERS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), NoneType: (NoneType,)}
"""Types of stored values by the type that an option declares."""


def carried(
    path: str, stored: dict[str, Any], backbone: dict[str, Any], model: type, data: type, words: Words
) -> dict[str, Any]:
    """The settings of a run that its checkpoint at `path` may give, in the layout of a YAML.

    stored: the configuration in the checkpoint. backbone: how it describes its raster model. model, data: classes whose
    arguments they are. words: what the user has typed, files included.

    Raises:
        ValueError: the checkpoint's model or data has a name that only the user may give, and did not.
    """
    taken: dict[str, Any] = {"seed_everything": stored.get("seed_everything")}
    if not fits(taken["seed_everything"], int | None):
        del taken["seed_everything"]
    module = plain_settings(model, _group(stored, "model"))
    if typed_by(words, "model.backbone", ("class_path", "preset", "directory", "kind")):
        module.pop("backbone", None)
    else:
        module["backbone"] = _backbone(path, backbone)
    if module.get("lora") is not None:
        module["init_from"] = path  # the frozen weights are in there
    if "validation" in module and not typed_by(words, "model.validation", ("features",)):
        module["validation"] |= {"samples": 0}  # a distance between features that nobody has typed
    settings = _group(stored, "data")
    settings = plain_settings(data, settings.get("init_args", settings))
    settings.pop("num_workers", None)  # processes are this machine's business
    taken["model"] = module
    taken["data"] = {
        "class_path": f"{data.__module__}.{data.__qualname__}",
        "init_args": settings,
    }
    return taken


def plain_settings(kind: type, values: Any) -> dict[str, Any]:
    """Of the arguments of a class, those that are numbers or known words of their declared types."""
    kept: dict[str, Any] = {}
    for name, hint in arguments(kind):
        if not isinstance(values, dict) or name not in values:
            continue
        value = values[name]
        groups = [each for each in (hint, *typing.get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
        if groups and isinstance(value, dict):
            kept[name] = plain_settings(groups[0], value)
        elif fits(value, hint):
            kept[name] = value
    return kept


def arguments(kind: type) -> Iterator[tuple[str, Any]]:
    """Names and types of a class's arguments; of a data module those of its parents too."""
    if is_dataclass(kind):
        yield from typing.get_type_hints(kind).items()
        return
    for owner in [owner for owner in kind.__mro__ if "__init__" in vars(owner) and owner is not object]:
        try:
            hints = typing.get_type_hints(vars(owner)["__init__"])
        except NameError:  # types of a user's class that only a type checker sees
            continue
        yield from ((name, hints[name]) for name in inspect.signature(owner).parameters if name in hints)


def fits(value: Any, hint: Any) -> bool:
    """Whether a stored value is a number, a truth value, null or a known word, as the declared type `hint` wants it."""
    kinds = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, kind) for kind in kinds)
    if origin is Literal:
        return isinstance(value, str | int | bool) and value in kinds
    if origin in (tuple, list):
        return isinstance(value, list) and all(fits(item, kinds[0]) for item in value)
    return type(value) in NUMBERS.get(hint, ())


def typed_by(words: Words, group: str, names: tuple[str, ...]) -> bool:
    """Whether the user gives one of the options of a group, or the group as a word."""
    return any(
        (key == group and isinstance(value, str))
        or (value is not None and key in [f"{group}.{inside}{name}" for name in names for inside in ("", "init_args.")])
        for key, value in words.pairs()
    )


def check_place(path: str, hint: str, stored: dict[str, Any], words: Words) -> None:
    """ValueError if nothing that the user has typed says where the data is; what the checkpoint names is not opened."""
    if typed_by(words, "data", ("class_path", "shards")):
        return
    data = [
        f"--{key} {shown(value)}"
        for key, value in flatten({"data": stored.get("data")}).items()
        if isinstance(value, str)
    ]
    named = f"it names {' '.join(data)}" if data else "it names none"
    raise ValueError(
        f"{path} does not say by itself which data to open: {named}, and nothing that a checkpoint names is opened, "
        f"imported or run. Type what you trust of it, such as --data.shards DIRECTORY, or {hint}."
    )


PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
"""What the state of a ModelCheckpoint calls files that it may replace, and so remove."""


def forget_strange_paths(checkpoint: dict[str, Any], folders: list[str | Path | None]) -> None:
    """Drop, in place, the files outside the checkpoint folders of a run that its checkpoint counts as its own."""
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        state |= {name: "" for name in PATHS if name in state and not _inside(state[name], folders)}
        if isinstance(best := state.get("best_k_models"), dict):
            state["best_k_models"] = {path: score for path, score in best.items() if _inside(path, folders)}


def _inside(path: Any, folders: list[str | Path | None]) -> bool:
    if not isinstance(path, str) or "://" in path:
        return isinstance(path, str) and ".." not in path and any(path.startswith(f"{each}/") for each in folders)
    return any(Path(folder).resolve() in Path(path).resolve().parents for folder in folders if folder is not None)


def left_out(stored: dict[str, Any], now: dict[str, Any], words: Words) -> list[str]:
    """The settings of a checkpoint that a run has not taken over, as options that would; not what the user typed."""
    typed = {_flat(key) for key, _ in words.pairs()}
    has = {_flat(key): value for key, value in flatten(now).items()}
    return [
        f"--{key} {shown(value)}"
        for key, value in flatten(stored).items()
        if has.get(_flat(key)) != value and _flat(key) not in typed
    ]


def _flat(key: str) -> str:
    """A key of the data without the level that a class path brings."""
    return key.replace("data.init_args.", "data.", 1)


def shown(value: Any) -> str:
    """A stored value as one word of a shell, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return shlex.quote("".join(letter if letter.isprintable() else "?" for letter in text))


def _group(stored: dict[str, Any], name: str) -> dict[str, Any]:
    group = stored.get(name)
    return group if isinstance(group, dict) else {}


def _backbone(path: str, described: dict[str, Any]) -> dict[str, Any]:
    """The raster model as kind and options, numbers and single words."""
    settings = {name: value for name, value in described.items() if _plain(value)}
    kind = settings.pop("kind", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"{path} was made with a backbone of kind {kind!r}, and a checkpoint never says what to import; give the "
            "run's YAML too: --config FILE."
        )
    return {"kind": kind, "options": settings}


def _plain(value: Any) -> bool:
    """Whether a value is a number, a word without a dot, null, or a list of such."""
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return (
        re.fullmatch(r"\w*", value) is not None
        if isinstance(value, str)
        else type(value) in (int, float, bool, NoneType)
    )
