"""Readers of text, JSON and YAML: bounded, strict, and with the file and the line in every error.

Standard library only at module level: every `--help` imports this file.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
    *(LookupError, TypeError, ValueError, AttributeError, AssertionError, SyntaxError, ArithmeticError, MemoryError),
    struct.error,
)
"""What readers raise for a damaged or foreign file. torch's unpickler has no error type of its own; numpy's reader
of headers raises SyntaxError or tokenize.TokenError, as the version of Python has it; RecursionError is a RuntimeError,
UnicodeDecodeError a ValueError."""
DEEPEST = 100
"""Levels of nesting in a text file; no file of ours has ten."""
TOO_DEEP = f"nested deeper than {DEEPEST} levels"
MOST_NODES = 100_000
"""Values in a YAML file, those that an alias repeats counted again."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins, which stands for a file that was not downloaded."""


def need_file(path: str | Path) -> Path:
    """`path`, if it is a file with its content. ValueError otherwise, also for a Git LFS pointer."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is a directory; expected a file." if file.is_dir() else f"no file {file}.")
    with file.open("rb") as stream:
        no_pointer(file, stream.read(len(POINTER)))
    return file


def no_pointer(path: str | Path, begin: bytes) -> None:
    """ValueError for a file that begins as a Git LFS pointer does."""
    if begin.startswith(POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ValueError about what `path` says begins with it; so do the errors of who meets other values than expected."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        found = f"it holds other names, types or shapes than expected ({type(error).__name__}: {error})"
        raise ValueError(f"{path} cannot be read: {found}.") from error


def read_text(path: str | Path, content: bytes | None = None) -> str:
    """A text file in UTF-8, with or without a byte order mark. ValueError names file and line.

    content: the file's bytes where they are in memory already; `path` is then a name for messages.
    """
    data = need_file(path).read_bytes() if content is None else content
    no_pointer(path, data[: len(POINTER)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text."
        ) from error


def read_lines(path: str | Path, content: bytes | None = None) -> list[tuple[int, str]]:
    """(number, line) of the lines of a text file that are not blank, without space around them, counted from 1.

    Only \\n ends a line: other separators of Unicode are part of a caption or a prompt.
    """
    lines = enumerate(read_text(path, content).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """Values of JSON text. ValueError names the file and the line for what is not strict JSON, or nested too deep.

    line: at which the text begins in the file.
    """
    try:
        values = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON: {found}.") from error
    except BROKEN as error:
        raise ValueError(f"{path}, line {line}: not JSON that can be read: {_without_advice(error)}.") from error
    level = [values]
    for _ in range(DEEPEST):
        level = [each for held in level if isinstance(held, dict | list) for each in _children(held)]
        if not level:
            return values
    raise ValueError(f"{path}, line {line}: {TOO_DEEP}.")


def _children(held: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits[:40])


def _without_advice(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "it does not fit in memory" if isinstance(error, MemoryError) else str(error)


def read_json(path: str | Path, content: bytes | None = None) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming file and line where it is missing, damaged, or no object."""
    values = parse_json(read_text(path, content), path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


def read_field(path: str | Path, name: str, kind: type[T]) -> T:
    """One value of a JSON object that a command of ours has written. Raises ValueError, naming the file, for others."""
    value = read_json(path).get(name)
    if not isinstance(value, kind):
        found = "nothing" if value is None else repr(value)[:60]
        raise ValueError(f"{path} has {found} as {name!r}; expected a {kind.__name__}. Restore it, or make it again.")
    return value


def read_yaml(path: str | Path, content: bytes | None = None) -> Any:
    """Values of a YAML file: plain types only. ValueError names the file, and the line where YAML has it.

    Aliases count as what they stand for, so that a file of a few lines cannot stand for 10^9 values.
    """
    return parse_yaml(read_text(path, content), path)


def parse_yaml(text: str, path: str | Path) -> Any:
    """`read_yaml` of text in memory; `path` is a name for messages."""
    import yaml

    class Bounded(yaml.SafeLoader):
        """Counts what it composes."""

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.nodes = self.depth = 0
            self.sizes: dict[int, int] = {}

        def fetch_flow_collection_start(self, kind: Any) -> None:
            if self.flow_level >= DEEPEST:  # the scanner looks ahead, and needs time like the square of the depth
                raise ValueError(f"it is {TOO_DEEP}")
            super().fetch_flow_collection_start(kind)

        def compose_node(self, parent: Any, index: Any) -> Any:
            alias, before = self.check_event(yaml.AliasEvent), self.nodes
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it is {TOO_DEEP}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and id(node) not in self.sizes:
                raise ValueError("an alias stands for what it is part of")
            self.nodes += self.sizes[id(node)] if alias else 1
            if self.nodes > MOST_NODES:
                raise ValueError(f"with its aliases it stands for more than {MOST_NODES:,} values")
            self.sizes.setdefault(id(node), self.nodes - before)
            return node

    try:
        return yaml.load(text, Loader=Bounded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{place}: not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, *BROKEN) as error:
        text = " ".join(_without_advice(error).split())[:200]
        raise ValueError(f"{path} is not YAML that can be read: {text}.") from error


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def reason(error: BaseException) -> str:
    """What a reader found, without torch's advice to read the file unsafely."""
    text = " ".join(str(error).split())
    if "PytorchStreamReader" in text:
        return "the file is truncated or damaged"
    if isinstance(error, LookupError | EOFError):
        return "it is no torch file, or a part of one"
    if isinstance(error, RecursionError | MemoryError):
        return _without_advice(error)
    if "allow_pickle" in text or "contains pickled" in text:
        return "it holds Python objects, which are never read"
    _, unpickler, found = text.partition("WeightsUnpickler error:")
    text = found.split(" Please use")[0].split(" Check the documentation")[0] if unpickler else text
    return f"{type(error).__name__}: {text.strip()[:200]}".rstrip(": ")
