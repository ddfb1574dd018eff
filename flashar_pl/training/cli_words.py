"""Words of the training command line: their order, and errors that name the closest known key."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

YAML = (".yaml", ".yml")


def checkpoint_of(words: list[str]) -> str | None:
    """The checkpoint to continue: --ckpt_path, or the key ckpt_path of a --config file; None = neither is given.

    Raises:
        ValueError: it does not exist.
    """
    path = None
    for file in (word.removeprefix("--config=") for word in words):
        if file.endswith(YAML) and Path(file).is_file():
            path = read_yaml(file).get("ckpt_path", path)
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--ckpt_path":
            path = after
        elif word.startswith("--ckpt_path="):
            path = word.split("=", 1)[1]
    if path in (None, "", "null"):
        return None
    if not Path(str(path)).exists():
        raise ValueError(f"--ckpt_path {path}: no such checkpoint; a fit writes them to checkpoints/ of its directory.")
    return str(path)


def read_yaml(file: str) -> dict[str, Any]:
    """The content of a YAML file; {} where it is no mapping. Raises ValueError for a file that is not YAML."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def configs_first(words: list[str]) -> list[str]:
    """The same options with all --config pairs in front, in their order: options win over files."""
    files: list[str] = []
    rest: list[str] = []
    i = 0
    while i < len(words):
        if words[i] in ("--config", "-c") and i + 1 < len(words):
            files += words[i : i + 2]
            i += 2
            continue
        (files if words[i].startswith("--config=") else rest).append(words[i])
        i += 1
    return files + rest


SECTIONS = (
    "model",
    "data",
    "trainer",
    *(f"model.{name}" for name in ("backbone", "optimiser", "schedule", "validation")),
)
"""Parts of a configuration that hold keys."""


def check_sections(words: list[str]) -> None:
    """ValueError for a file among `words` in which a part that holds keys is a number or text."""
    for file in (word.removeprefix("--config=") for word in words):
        content = read_yaml(file) if file.endswith(YAML) and Path(file).is_file() else {}
        for section in SECTIONS:
            value: Any = content
            for name in section.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if not isinstance(value, dict | None) and not str(value).endswith(YAML):
                raise ValueError(f"{section} is {value!r} in {file}; expected keys with values, as in experiments/.")


def explain(message: str, known: list[str]) -> str:
    """jsonargparse's message on one line; for an unknown key, with the closest known ones."""
    text = " ".join(message.split())
    absent = re.search(r"File does not exist: '([^']+)'", text)
    if absent:
        return f"no configuration {absent[1]}; expected a YAML such as experiments/demo_raster.yaml."
    inside_class = re.search(
        r"Problem with given class_path '([\w.]+)': (.+?)(?: - Not a valid| Given value type|$)", text
    )
    key_of_class = re.search(r'Parser key "(trainer[\w.]+)"', text)
    if inside_class and key_of_class:
        return _explain_class(key_of_class[1], inside_class[1], inside_class[2])
    nested = re.search(r'Parser key "(trainer[\w.]+)".*Given value: NestedArg\(key=\'([^\']+)\'', text)
    if nested:
        return f"{nested[1]}.init_args.{nested[2]} is given, but {nested[1]} names no class; give its class_path first."
    for pattern in (
        r"does not accept option '([^']+)'",
        r"nrecognized arguments: --([\w.\-]+)",
        r"Key '([^']+)' is not expected",
        r"No action for key \"([^\"]+)\"",
        r"Option '([^']+)' is not accepted",
    ):
        found = re.search(pattern, text)
        if found:
            inside = re.search(r'Parser key "([\w.]+)"', text)
            word = found[1] if inside is None or inside[1] in found[1] else f"{inside[1]}.{found[1]}"
            return f"no configuration key {word!r}; closest: {', '.join(nearest(word, known))}."
    file = re.search(r"nrecognized arguments: (?!-)(\S+)", text)
    if file:
        return f"{file[1]!r} belongs to no option; a configuration is given as --config {file[1]}."
    refused = re.search(r"Does not validate against any .*? Errors: - (\w+\.\w+ is .+?)\. - Expected a ", text)
    if refused:  # an optional part of the model, and its own message
        return f"model.{refused[1]}."
    value = re.search(r"Expected an? (.+?)\. Got value: (\S+)", text)
    if value:
        key = ""
        for part in re.findall(r'Parser key "([\w.]+)"', text):
            key = part if part.startswith(key) else f"{key}.{part}"
        return f"{key} is {value[2]!r}; expected {_kind(value[1])}."
    optional = re.search(r'^Parser key "([\w.]+)": .*Subtypes: \[(.+?)\] Errors: .* Given value: (.+)$', text)
    if optional:
        subtypes = re.sub(r"typing\.Literal\[(.+?)\]", r"\1", optional[2].replace("<class '", ""))
        kinds = dict.fromkeys(kind.strip("<>'[]").split(".")[-1] for kind in subtypes.split(", "))
        expected = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        return f"{optional[1]} is {optional[3]!r}; expected {expected}."
    return text


def _explain_class(key: str, path: str, problem: str) -> str:
    """What is wrong with the class at import path `path`, or with one of its init_args."""
    option = re.search(r"Option '([^']+)' is not accepted", problem)
    if option:
        module, _, name = path.rpartition(".")
        names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        near = difflib.get_close_matches(option[1], names, n=3, cutoff=0.4) or names
        return f"no configuration key '{key}.init_args.{option[1]}'; closest: {', '.join(near)} of {path}."
    value = re.search(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (\S+)', problem)
    if value:
        return f"{key}.init_args.{value[1]} is {value[3]!r}; expected {_kind(value[2])}."
    return f"{key}: class_path {path}: {problem}."


def _kind(text: str) -> str:
    """A type in jsonargparse's words, shorter."""
    short = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", text)
    return " or ".join(re.findall(r"'([^']+)'", short)) if short.startswith("Literal") else short


def nearest(word: str, known: list[str]) -> list[str]:
    """Known keys that resemble `word`: first by their last part, beside it and deeper, then as a whole."""
    group, _, last = word.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == group]
    near = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in siblings], n=3, cutoff=0.5)
    beside = [f"{group}.{name}" if group else name for name in near]
    top = word.split(".")[0]
    deeper = [key for key in known if key.startswith(f"{top}.") and _alike(last, key.rpartition(".")[2])]
    if beside or deeper:
        return list(dict.fromkeys(beside[:2] + deeper))[:3]
    return difflib.get_close_matches(word, known, n=3, cutoff=0.4) or siblings[:8] or ["model", "data", "trainer"]


def nested_keys(prefix: str, hints: dict[str, Any]) -> set[str]:
    """Keys of the dataclass-typed parameters among `hints`, optional ones included."""
    keys: set[str] = set()
    for name, hint in hints.items():
        for kind in (hint, *typing.get_args(hint)):
            if is_dataclass(kind):
                keys |= {f"{prefix}.{name}.{f.name}" for f in fields(kind)}
    return keys


def _alike(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word, other).ratio() >= 0.75
