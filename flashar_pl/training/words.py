"""The words of a training command line before they are parsed: files, options, and keys that nothing knows."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer, loggers

from flashar_pl.backbones import Backbone
from flashar_pl.recipes import find_recipe
from flashar_pl.text_files import read_yaml

DEFAULT_DATA = "CodesDataModule"
"""Data module of a configuration that names none."""
OPTIONS = ("flashar_pl.training.config.", "flashar_pl.training.stages.", "flashar_pl.models.lora.")
"""Where dataclasses of options are; a class_path of the user's is elsewhere."""
ELSEWHERE = {
    "learning_rate": "lr", "epochs": "max_epochs", "steps": "max_steps", "max_train_steps": "max_steps",
    "gpus": "devices", "num_gpus": "devices", "seed": "seed_everything", "output_dir": "default_root_dir",
    "out": "default_root_dir", "guidance_scale": "cfg_scale", "grad_clip": "clip", "data": "shards",
    "mixed_precision": "precision", "resume_from_checkpoint": "ckpt_path", "warmup_steps": "warmup",
}  # fmt: skip
"""What other programs call a key -> its last part here."""


@dataclass(frozen=True)
class Words:
    """Configuration files, which come first whatever their place, and the options, which win over them."""

    files: tuple[dict[str, Any], ...]
    """What each file holds."""
    options: tuple[tuple[str, str | None], ...]
    """Dotted key and value; None = it has none, as --help."""

    @classmethod
    def read(cls, argv: list[str]) -> Words:
        """Take a command line apart. ValueError for a file that is missing or no YAML, and a word beside options."""
        files, options, pending = [], [], list(argv)
        while pending:
            word = pending.pop(0)
            if not word.startswith("-"):
                raise ValueError(f"{word!r} belongs to no option; a configuration is given as --config {word}.")
            word, equals, value = word.partition("=")
            given: str | None = value if equals else None
            if not equals and pending and not pending[0].startswith("--"):
                given = pending.pop(0)
            if word in ("--config", "-c") and given is not None:
                files.append(read_configuration(given))
            else:
                key = word.removeprefix("--")  # "" for a bare --
                key = key if key.startswith("-") else key.replace("-", "_")
                given = "true" if (key, given) == ("download", None) else given  # a flag, as in every command
                options.append(("ckpt_path" if key == "checkpoint" else key, given))
        return cls(tuple(files), tuple(options))

    def before(self, stored: dict[str, Any]) -> Words:
        """The same words with a configuration that all others win over."""
        return replace(self, files=(stored, *self.files))

    def parsed(self) -> list[str]:
        """The command line in the order in which later words win, the files as one."""
        together: dict[str, Any] = functools.reduce(merged, self.files, {})
        words = ["--config", yaml.dump(together, Dumper=_WithoutAliases, sort_keys=False)] if self.files else []
        for key, value in self.options:
            option = key if key.startswith("-") else f"--{key}"
            if _is_classes(value) and not key.endswith("+"):
                words += [option, "null"]  # else each class would keep settings of the one it takes the place of
            words += [option, *([] if value is None else [value])]
        return words

    @property
    def wants_help(self) -> bool:
        """Whether the call only asks for a help text."""
        return any(key.rpartition(".")[2] in ("help", "-h") for key, _ in self.options)

    def given(self, key: str) -> Any:
        """The value of a key, by the option or file that wins; None = nothing gives it."""
        values = [value for name, value in self.pairs() if name == key]
        return values[-1] if values else None

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """Every dotted key that files and options give, and its value; the last one wins."""
        for content in self.files:
            yield from _pairs(content)
        for key, text in self.options:
            if key.rpartition(".")[2] not in ("help", "-h", "print_config"):
                yield key, _value(text)

    def checkpoint(self) -> str | None:
        """The checkpoint to continue, None = there is none. ValueError if it does not exist."""
        path = self.given("ckpt_path")
        if path and not Path(str(path)).exists():
            raise ValueError(
                f"--checkpoint {path}: no such checkpoint; a fit writes them to checkpoints/ of its directory."
            )
        return str(path) if path else None

    def with_places(self, root: str) -> Words:
        """Loggers that are asked where to write, and were not told, write into the run directory `root`."""
        logger = self.given("trainer.logger")
        if not isinstance(logger, str | dict | list):
            return self
        placed = [_placed(entry, root) for entry in logger] if isinstance(logger, list) else _placed(logger, root)
        before = [pair for pair in self.options if pair[0] == "trainer.logger"]
        after = [pair for pair in self.options if pair[0] != "trainer.logger"]
        return replace(self, options=(*before, ("trainer.logger", json.dumps(placed)), *after))


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def merged(older: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """Two configurations as one, in which the newer wins. A list replaces a list, a mixture of shards a mixture, and a
    class another class with all its settings, so that what a file says of a callback is all that the callback has."""
    values = dict(older)
    for key, value in newer.items():
        usual = DEFAULT_DATA if key == "data" else None
        values[key] = value if key == "shards" else _over(values.get(key), value, usual)
    return values


def _over(old: Any, new: Any, usual: str | None) -> Any:
    """usual: the class of settings that name none."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "class_path" in new and "class_path" not in old and usual is not None:
        old = {"class_path": usual, "init_args": old}
    if "class_path" in old and "class_path" in new and not _same_class(old["class_path"], new["class_path"]):
        return new
    if "class_path" in old and not new.keys() & {"class_path", "init_args"}:
        new = {"init_args": new}
    return merged(old, new)


def _same_class(*paths: Any) -> bool:
    """Whether two import paths, of which one may be a bare name, mean one class."""
    first, second = map(str, paths)
    return first == second or (not ("." in first and "." in second) and _last(first) == _last(second))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def read_configuration(file: str) -> dict[str, Any]:
    """The content of a YAML file with keys. ValueError where there is none."""
    path = find_recipe(file)
    if not path.is_file():
        raise ValueError(f"no configuration {file}; expected a YAML such as experiments/demo_raster.yaml.")
    content = _at_home(read_yaml(path))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {str(content)[:40]!r}; expected keys with values, as in experiments/.")
    return content


def _at_home(value: Any) -> Any:
    """Values of a YAML in which paths that begin with ~/ are in the home directory."""
    if isinstance(value, dict):
        return {_at_home(key): _at_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _value(text: str | None) -> Any:
    """What an option's text means; no YAML is a text too, such as @scratch."""
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_classes(text: str | None) -> bool:
    """Whether an option's text is a list of classes with their settings."""
    value = _value(text) if text is not None and text.lstrip().startswith("[") else None
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _pairs(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{name}.")


def _placed(entry: Any, root: str) -> Any:
    """A logger's class_path and init_args, with save_dir where it is one of Lightning's that has one."""
    entry = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    kind = getattr(loggers, str(entry.get("class_path")).rpartition(".")[2], None)
    if kind is not None and "save_dir" in inspect.signature(kind).parameters:
        entry["init_args"] = {"save_dir": root} | (entry.get("init_args") or {})
    return entry


# --- keys ------------------------------------------------------------------------------------------------------------


def check_keys(words: Words, model: type, data: dict[str, type[LightningDataModule]]) -> None:
    """ValueError for a key that nothing knows, with the closest ones, or a group of keys that is given a value.

    model: the module's class. data: data modules by short name; others are given by their import path.
    """
    known = {"seed_everything", "ckpt_path", "download", "data.class_path"}
    known |= {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    groups = {"model", "data", "trainer", "data.init_args"}
    for name, hint in typing.get_type_hints(model.__init__).items():  # type: ignore[misc]
        options = (hint, *typing.get_args(hint))
        kinds = [kind for kind in options if is_dataclass(kind)]
        known |= {f"model.{name}.{field.name}" for kind in kinds for field in fields(kind)} or {f"model.{name}"}
        if any(isinstance(kind, type) and issubclass(kind, Backbone) for kind in options):
            known |= {f"model.{name}.class_path", f"model.{name}.init_args"}
        groups |= {f"model.{name}"} if kinds else set()
    for kind in [kind for owner in data_classes(words, data) for kind in owner.__mro__ if "__init__" in vars(kind)]:
        names = list(inspect.signature(vars(kind)["__init__"]).parameters)[1:]
        known |= {f"data.{prefix}{name}" for name in names for prefix in ("", "init_args.")}
    for key, value in words.pairs():
        key = key.rstrip("+")
        if key in groups:
            if not isinstance(value, dict | str | None):
                raise ValueError(f"{key} is {value!r}; expected keys with values, as in experiments/.")
            odd = sorted(value.keys() - {"class_path", "init_args"}) if isinstance(value, dict) else []
            if odd and "class_path" in (value or {}):
                raise ValueError(f"{key} has {', '.join(odd)} beside class_path; put it below {key}.init_args.")
        elif not any(key == name or key.startswith(f"{name}.") for name in known):
            if isinstance(value, dict) and value:
                continue  # what is below it says more
            raise ValueError(f"no configuration key {key!r}; closest: {', '.join(nearest(key, known))}.")


def data_classes(words: Words, short: dict[str, type[LightningDataModule]]) -> Iterator[type[LightningDataModule]]:
    """The data modules that files and options name, and ours."""
    yield next(iter(short.values()))
    for key, value in words.pairs():
        if key != "data.class_path" and (key != "data" or not isinstance(value, str)):
            continue
        module, _, name = str(value).rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name) if module else short[name]
        except (ImportError, AttributeError, KeyError):
            found = None
        if not (isinstance(found, type) and issubclass(found, LightningDataModule)):
            raise ValueError(
                f"data.class_path is {value!r}, which is no data module; expected one of {', '.join(short)}, or the "
                "path of a LightningDataModule: package.module.Class."
            )
        yield found


def nearest(word: str, known: set[str]) -> list[str]:
    """Known keys of the same group whose last part resembles that of `word`, else those that resemble it as a whole."""
    last = word.rpartition(".")[2]
    meant = ELSEWHERE.get(last, last)
    if exact := sorted((key for key in known if key.rpartition(".")[2] == meant), key=len)[:3]:
        return exact  # the right word in another place, or another program's word
    group = [key for key in known if key.startswith(f"{word.split('.')[0]}.")] or known
    ends = {key.rpartition(".")[2]: key for key in sorted(group, key=len, reverse=True)}  # the shortest key of an end
    alike = difflib.get_close_matches(last, ends, n=3, cutoff=0.5)
    whole = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.4)
    return [ends[end] for end in alike] or whole or ["model", "data", "trainer"]


# --- values ----------------------------------------------------------------------------------------------------------

SAID_BETTER = (
    "Does not validate", "Errors:", "Given value type", "Expected a <", "Expected <", "Expected a typing.",
    "Expected a path but", "Not a valid subclass", "Subclass types", "a class path", "a dict with",
)  # fmt: skip
"""How lines begin that say nothing which another line does not say better."""


def explain(message: str) -> str:
    """jsonargparse's message about a value on one line. It nests what each type of a union had against it: of the
    lines that give a reason, the deepest one says most, and the last of those."""
    keys: dict[int, str] = {}  # by indentation
    owners: dict[int, str] = {}
    union, deepest, reason = "", 0, " ".join(message.split())
    for line in filter(str.strip, message.splitlines()):
        text = line.lstrip(" -")
        depth = len(line) - len(text)
        keys, owners = ({at: name for at, name in names.items() if at < depth} for names in (keys, owners))
        if text.startswith('Parser key "'):
            keys[depth] = text.split('"')[1]
        elif text.startswith("Problem with given class_path '"):
            owners[depth] = text.split("'")[1]
        elif text.startswith("Subtypes: "):
            union = text  # the value follows
        elif depth > 0 and depth >= deepest and (". Got value: " in text or not text.startswith(SAID_BETTER)):
            reason, deepest = _reason(text, list(keys.values()), list(owners.values())[-1:], union), depth
    return reason


def _reason(text: str, keys: list[str], owner: list[str], union: str) -> str:
    """One line of a message in our words.

    keys: where the value is. owner: the class that refuses it, if one does. union: types that were possible.
    """
    classes = [name for name in owner if not name.startswith(OPTIONS) and keys[:1] != ["data"]]
    inside = ".init_args." if classes else "."
    key = inside.join(keys)
    if text.startswith("Option '"):
        option, [kind] = text.split("'")[1], owner
        module, _, name = kind.rpartition(".")
        names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        near = difflib.get_close_matches(option, names, n=3, cutoff=0.4) or names
        return f"no configuration key '{key}{inside}{option}'; closest: {', '.join(near)} of {kind}."
    if ". Got value: " in text:
        union, text = text.removeprefix("Expected a ").split(". Got value: ")
        return f"{key} is {text!r}; expected {_names(union)}."
    if text.startswith("Given value: "):
        return f"{key} is {text.removeprefix('Given value: ')!r}; expected {_names(union)}."
    if text.startswith("Expected a dot import path string: "):
        such = ", such as flashar_pl.training.ShardedStrategy" if key == "trainer.strategy" else ""
        return f"{key} is {text.split(': ', 1)[1]!r}, which has no options; expected the import path of a class{such}."
    where = "".join(f"{name}: " for name in classes or [key] if name)
    return f"{where}{text.rstrip('.')}."


def _names(kinds: str) -> str:
    """Python's words for types or choices, shorter."""
    names = re.findall(r"'([^']+)'", kinds) or [kinds]
    return " or ".join("null" if name == "NoneType" else name for name in names)
