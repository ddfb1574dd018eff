"""The words of a training command line before they are parsed: files, options, and keys that nothing knows."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer, loggers

from flashar_pl.backbones import Backbone

CONFIG = ("--config", "-c")
OPTIONS = "flashar_pl.training.config."
"""Where dataclasses of options are; a class_path of the user's is elsewhere."""
OTHER_KEYS = {"seed_everything", "ckpt_path"}


@dataclass(frozen=True)
class Words:
    """Configuration files, which come first whatever their place, and the options, which win over them."""

    files: tuple[tuple[str, dict[str, Any]], ...]
    """Path or YAML text, and its content."""
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
            if word in CONFIG and given is not None:
                files.append((given, read_yaml(given)))
            else:
                options.append((word.removeprefix("--"), given))
        return cls(tuple(files), tuple(options))

    def before(self, stored: dict[str, Any]) -> Words:
        """The same words with a configuration that all others win over."""
        return replace(self, files=((yaml.safe_dump(stored), stored), *self.files))

    def parsed(self) -> list[str]:
        """The command line in the order in which later words win."""
        options = [word for key, value in self.options for word in (_typed(key), *([] if value is None else [value]))]
        return [word for file, _ in self.files for word in ("--config", file)] + options

    @property
    def wants_help(self) -> bool:
        """Whether the call only asks for a help text."""
        return any(key.rpartition(".")[2] in ("help", "-h") for key, _ in self.options)

    def given(self, key: str) -> Any:
        """The value of a key, by the option or file that wins; None = nothing gives it."""
        found = None
        for _, content in self.files:
            value: Any = content
            for name in key.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            found = found if value is None else value
        for option, text in self.options:
            found = yaml.safe_load(text) if option == key and text is not None else found
        return found

    def given_keys(self) -> Iterator[tuple[str, Any]]:
        """Every dotted key that files and options give, and its value."""
        for _, content in self.files:
            yield from _keys(content)
        for option, text in self.options:
            if option.rpartition(".")[2] not in ("help", "-h", "print_config"):
                yield option.rstrip("+"), text

    def typed(self) -> Iterator[Any]:
        """Contents of files and values of options, those of a class_path as {"class_path": value}."""
        yield from (content for _, content in self.files)
        for key, text in self.options:
            value = None if text is None else yaml.safe_load(text)
            yield {"class_path": value} if key.endswith("class_path") else value

    def checkpoint(self) -> str | None:
        """The checkpoint to continue, None = there is none. ValueError if it does not exist."""
        path = self.given("ckpt_path")
        if path in (None, "", "null"):
            return None
        if not Path(str(path)).exists():
            raise ValueError(
                f"--ckpt_path {path}: no such checkpoint; a fit writes them to checkpoints/ of its directory."
            )
        return str(path)

    def with_places(self, root: str) -> Words:
        """Loggers that are asked where to write, and were not told, write into the run directory `root`."""
        logger = self.given("trainer.logger")
        if not isinstance(logger, str | dict | list):
            return self
        placed = [_placed(entry, root) for entry in (logger if isinstance(logger, list) else [logger])]
        value = json.dumps(placed if isinstance(logger, list) else placed[0])
        before = [pair for pair in self.options if pair[0] == "trainer.logger"]
        after = [pair for pair in self.options if pair[0] != "trainer.logger"]
        return replace(self, options=(*before, ("trainer.logger", value), *after))


def read_yaml(file: str) -> dict[str, Any]:
    """The content of a YAML file with keys. ValueError where there is none."""
    if not Path(file).is_file():
        raise ValueError(f"no configuration {file}; expected a YAML such as experiments/demo_raster.yaml.")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {str(content)[:40]!r}; expected keys with values, as in experiments/.")
    return content


def _typed(key: str) -> str:
    return key if key.startswith("-") else f"--{key}"


def _keys(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _placed(entry: Any, root: str) -> Any:
    """A logger's class_path and init_args, with save_dir where its class has one."""
    entry = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    arguments = dict(entry.get("init_args") or {})
    module, _, name = str(entry.get("class_path")).rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else loggers, name)
    except (ImportError, AttributeError):
        return entry  # the parser says what is wrong with it
    if "save_dir" in inspect.signature(found).parameters:
        arguments.setdefault("save_dir", root)
    return entry | {"init_args": arguments}


# --- keys ------------------------------------------------------------------------------------------------------------


def check_keys(words: Words, model: type, data: dict[str, type[LightningDataModule]]) -> None:
    """ValueError for a key that nothing knows, with the closest ones, or a group of keys that is given a value.

    model: the module's class. data: data modules by short name; others are given by their import path.
    """
    known = OTHER_KEYS | {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    groups = {"model", "data", "trainer"}
    for name, hint in typing.get_type_hints(model.__init__).items():  # type: ignore[misc]
        options = (hint, *typing.get_args(hint))
        kinds = [kind for kind in options if is_dataclass(kind)]
        known |= {f"model.{name}.{field.name}" for kind in kinds for field in fields(kind)} or {f"model.{name}"}
        if any(isinstance(kind, type) and issubclass(kind, Backbone) for kind in options):
            known |= {f"model.{name}.class_path", f"model.{name}.init_args"}
        groups |= {f"model.{name}"} if kinds else set()
    for owner in _data_classes(words, data):
        names = {name for kind in owner.__mro__ if kind is not object for name in _arguments(kind)}
        known |= {f"data.{prefix}{name}" for name in names for prefix in ("", "init_args.")}
    known |= {"data.class_path"}
    groups |= {"data.init_args"}
    for key, value in words.given_keys():
        if key in groups:
            if not isinstance(value, dict | str | None):
                raise ValueError(f"{key} is {value!r}; expected keys with values, as in experiments/.")
            beside = {} if not isinstance(value, dict) or "class_path" not in value else value
            if beside.keys() - {"class_path", "init_args"}:
                odd = ", ".join(sorted(beside.keys() - {"class_path", "init_args"}))
                raise ValueError(f"{key} has {odd} beside class_path; put it below {key}.init_args.")
        elif not any(key == name or key.startswith(f"{name}.") for name in known):
            if isinstance(value, dict) and value:
                continue  # what is below it says more
            raise ValueError(f"no configuration key {key!r}; closest: {', '.join(nearest(key, sorted(known)))}.")


def _data_classes(words: Words, short: dict[str, type[LightningDataModule]]) -> Iterator[type[LightningDataModule]]:
    """The data modules that files and options name, and ours."""
    yield from list(short.values())[:1]
    for key, value in words.given_keys():
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


def _arguments(kind: type) -> list[str]:
    return list(inspect.signature(vars(kind)["__init__"]).parameters)[1:] if "__init__" in vars(kind) else []


def nearest(word: str, known: list[str]) -> list[str]:
    """Known keys that resemble `word`: by their last part beside it and deeper, else as a whole."""
    group, _, last = word.rpartition(".")
    top = f"{word.split('.')[0]}."

    def alike(keys: list[str], cutoff: float) -> list[str]:
        ends = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in keys], n=3, cutoff=cutoff)
        return [key for end in dict.fromkeys(ends) for key in keys if key.rpartition(".")[2] == end]

    beside = [key for key in known if key.rpartition(".")[0] == group]
    found = alike(beside, 0.5)[:2] + alike([key for key in known if key.startswith(top)], 0.75)
    whole = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return list(dict.fromkeys(found))[:3] or whole or beside[:8] or ["model", "data", "trainer"]


# --- values ----------------------------------------------------------------------------------------------------------


def explain(message: str) -> str:
    """jsonargparse's message about a value on one line. It nests what each type of a union had against it."""
    text = " ".join(_one_type(message).split())
    path = re.findall(r'Parser key "([\w.]+)"', text)
    path = [name for i, name in enumerate(path) if not any(later.startswith(f"{name}.") for later in path[i + 1 :])]
    classes = ("trainer", "model.backbone")  # keys whose values may be classes
    named = re.search(rf"given class_path '(?!{re.escape(OPTIONS)})", text)
    inner = ".init_args." if named and path and path[0].startswith(classes) else "."
    key = inner.join(path)
    option = re.search(r"class_path '([\w.]+)': Option '([^']+)' is not accepted", text)
    if option:
        module, _, name = option[1].rpartition(".")
        names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        near = difflib.get_close_matches(option[2], names, n=3, cutoff=0.4) or names
        return f"no configuration key '{key}{inner}{option[2]}'; closest: {', '.join(near)} of {option[1]}."
    own = re.search(r"Errors: - (\w+\.\w+ is .+?)\. - Expected a ", text)
    if own:  # an optional part of the model refuses its values in our words
        return f"model.{own[1]}."
    text = text[text.rindex("Parser key") :] if path else text  # what is innermost says most
    value = re.search(r"Expected an? ((?:(?!Expected ).)+?)\. Got value: (\S+)", text)
    if value:
        return f"{key} is {value[2]!r}; expected {_names(value[1])}."
    inside = re.search(r"Problem with given class_path '([\w.]+)': (.+?)\.?(?: - Expected | Given value|$)", text)
    if inside:  # such as a package that a logger needs
        return f"{inside[1]}: {inside[2]}."
    union = re.search(r"Subtypes: \[(.+?)\] Errors: - (.*?) Given value type: .*? Given value: (.+?)(?: - |$)", text)
    if union is None:
        return text
    whys = [why for why in union[2].split(" - ") if not why.startswith(("Expected a <class", "Expected a path"))]
    return f"{key} is {union[3]!r}; {whys[0] if whys else f'expected {_names(union[1])}'}."


def _one_type(message: str) -> str:
    """The message without what a dataclass had against a class_path, or a class against a dataclass's fields."""
    if not message.startswith('Parser key "model.backbone"'):
        return message
    head, *reasons = re.split(r"^    - ", message, flags=re.MULTILINE)
    other = [why for why in reasons if re.search(rf"(class_path|Import path) '?(?!'|{re.escape(OPTIONS)})", why)]
    named = [why for why in other if "Subclasses are disabled" not in why]
    fitting = named or [why for why in reasons if "instantiatable" not in why]
    return message if len(reasons) < 2 else head + "".join(f"    - {why}" for why in fitting[-1:])


def _names(kinds: str) -> str:
    """Python's words for types or choices, shorter."""
    names = re.findall(r"'([^']+)'", kinds) or [kinds]
    return " or ".join("null" if name == "NoneType" else name for name in names)
