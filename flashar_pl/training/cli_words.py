"""Words of the training command line: their order, and errors that name the closest known key."""

from __future__ import annotations

import difflib
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
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            path = content.get("ckpt_path", path) if isinstance(content, dict) else path
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


def explain(message: str, known: list[str]) -> str:
    """jsonargparse's message on one line; for an unknown key, with the closest known ones."""
    text = " ".join(message.split())
    absent = re.search(r"File does not exist: '([^']+)'", text)
    if absent:
        return f"no configuration {absent[1]}; expected a YAML such as experiments/demo_raster.yaml."
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
        kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", value[1])
        return f"{key} is {value[2]!r}; expected {kind}."
    optional = re.search(r'^Parser key "([\w.]+)": .*Subtypes: \[(.+?)\] Errors: .* Given value: (.+)$', text)
    if optional:
        kinds = [kind.strip("<>'").split(".")[-1] for kind in optional[2].replace("<class '", "").split(", ")]
        expected = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        return f"{optional[1]} is {optional[3]!r}; expected {expected}."
    return text


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
