"""Command line of a typed function: options from its signature, help text from where each is declared.

A parameter whose type is a dataclass is a group of options: each field becomes one (`num_images` is typed
`--num-images`), described by the text under it, and the function receives the object. Positional-only parameters become
positional arguments (of a group: its fields without a default), other parameters options of their own, described
under `Args:`. What has no default is required, booleans are switches, a union that contains `str` is read as text. The
docstring of the function has a summary, an explanation, `Example:` and `Args:`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from flashar_pl.files import closest


@dataclass(frozen=True)
class Option:
    """One option or positional argument."""

    name: str
    hint: Any
    text: str
    default: Any
    """MISSING = it must be given."""
    group: str | None = None
    """Parameter of the function that holds it; None = it is a parameter itself."""
    title: str | None = None
    """Heading in the help."""
    nargs: Literal["*"] | None = None
    positional: bool = False

    @property
    def typed(self) -> str:
        """How it is typed: num_images -> --num-images."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING


@cache
def field_texts(group: type) -> dict[str, str]:
    """The text under each field of a dataclass, those it inherits included."""
    texts: dict[str, str] = {}
    for owner in reversed(group.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:]):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                    texts[name] = " ".join(str(text).split())
    return texts


def group_of(hint: Any) -> type | None:
    """The dataclass that a parameter takes, alone or in an optional; None for any other type."""
    parts = _parts(hint)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], type) and is_dataclass(parts[0]) else None


def options_of(function: Callable[..., Any]) -> list[Option]:
    """Everything that can be typed after the command, in the order of the signature."""
    found: list[Option] = []
    hints, texts = typing.get_type_hints(function), _sections(function)[2]
    for name, parameter in inspect.signature(function).parameters.items():
        group = group_of(hints[name])
        if group is None:
            assert name in texts, f"{function.__name__}: parameter {name} has no description"
            many = parameter.kind is parameter.VAR_POSITIONAL
            positional = many or parameter.kind is parameter.POSITIONAL_ONLY
            default = MISSING if parameter.default is parameter.empty else parameter.default
            found.append(
                Option(
                    name, hints[name], texts[name], default=default, nargs="*" if many else None, positional=positional
                )
            )
            continue
        types_, told = typing.get_type_hints(group), field_texts(group)
        title = inspect.cleandoc(group.__doc__ or "").split("\n")[0].rstrip(".").lower()
        for field in fields(group):
            assert field.name in told, f"{group.__name__}.{field.name} has no description"
            default = _default(field, parameter)
            bare = parameter.kind is parameter.POSITIONAL_ONLY and default is MISSING
            text = told[field.name]
            found.append(Option(field.name, types_[field.name], text, default, name, title, positional=bare))
    names = [option.name for option in found]
    assert len(names) == len(set(names)), f"{function.__name__} declares an option twice: {sorted(names)}"
    return found


def _default(field: Field, parameter: inspect.Parameter) -> Any:
    """Of a field of a group: the parameter's default says it, else the field's own."""
    if parameter.default is parameter.empty:
        return field.default
    if parameter.default is None:  # the group may be left out
        return None if field.default is MISSING else field.default
    return getattr(parameter.default, field.name)


def build_parser(function: Callable[..., Any], prog: str) -> argparse.ArgumentParser:
    """The parser of `flashar VERB` for a command function."""
    options = options_of(function)
    explanation, example, _ = _sections(function)
    parser = _Parser(
        prog=prog,
        usage=_usage(prog, options),
        description=explanation,
        epilog=f"example:\n{textwrap.indent(_as_typed(example), '  ')}" if example else None,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    groups: dict[str | None, Any] = {None: parser}
    for option in sorted(options, key=lambda option: not option.required):
        heading = None if option.required else option.title
        if heading not in groups:
            groups[heading] = parser.add_argument_group(str(heading))
        _add(groups[heading], option)
    return parser


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the process."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wide help lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def _sections(function: Callable[..., Any]) -> tuple[str, str, dict[str, str]]:
    """Explanation, example, and the text of each parameter in a docstring."""
    doc = inspect.cleandoc(function.__doc__ or "")
    explanation, *rest = re.split(r"^(Example|Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    parts = dict(zip(rest[::2], rest[1::2]))
    entries = re.split(r"^(\w+): ", textwrap.dedent(parts.get("Args", "")), flags=re.MULTILINE)[1:]
    texts = {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2])}
    return explanation.strip(), textwrap.dedent(parts.get("Example", "")).strip(), texts


def _as_typed(example: str) -> str:
    """An example that a shell takes as it is: a line that starts no command continues the one before it."""
    lines: list[str] = []
    for line in filter(None, example.splitlines()):
        if lines and not line.startswith(("flashar ", "torchrun ")):
            lines[-1] += " \\"
            line = "  " + line.strip()
        lines.append(line)
    return "\n".join(lines)


def _usage(prog: str, options: list[Option]) -> str:
    words = [prog]
    for option in options:
        if option.positional:
            words.append(f"{option.typed} [{option.typed} ...]" if option.nargs else option.typed)
        elif option.required:
            words.append(f"{option.typed} {_metavar(option)}")
    return " ".join([*words, "[options]"])


def _add(parser: Any, option: Option) -> None:
    text = option.text.replace("%", "%%")
    if option.positional:
        nargs = option.nargs or "?"  # `parse` says what is missing
        parser.add_argument(
            option.name, type=_reader(option), metavar=option.typed, help=text, nargs=nargs, default=MISSING
        )
        return
    if option.hint is bool:
        parser.add_argument(option.typed, action="store_true", help=text)
        return
    if option.required:
        text += " Required."
    elif option.default is not None and "Default:" not in text:
        text += f" Default: {option.default}."
    action = "append" if _is_list(option.hint) else "store"
    parser.add_argument(
        option.typed, action=action, type=_reader(option), default=option.default, metavar=_metavar(option), help=text
    )


def _parts(hint: Any) -> list[Any]:
    """The types of a union; one type otherwise."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for part in typing.get_args(hint) if part is not type(None)] if union else [hint]


def _is_list(hint: Any) -> bool:
    return str not in _parts(hint) and any(typing.get_origin(part) is list for part in _parts(hint))


def _choices(hint: Any) -> list[str]:
    """The values of a Literal, also inside an optional."""
    return [str(v) for part in _parts(hint) if typing.get_origin(part) is Literal for v in typing.get_args(part)]


def _metavar(option: Option) -> str:
    """N for a whole number, X for a number, {a,b} for a choice, otherwise the option's name."""
    kinds, choices = _parts(option.hint), _choices(option.hint)
    if choices:
        return "{" + ",".join([*choices, *(["N"] if int in kinds else [])]) + "}"
    return "N" if int in kinds else "X" if float in kinds else option.name.upper()


def _reader(option: Option) -> Callable[[str], Any]:
    """What turns a typed word into the option's value."""
    kinds, choices = _parts(option.hint), _choices(option.hint)

    def read(word: str) -> Any:
        if str in kinds or _is_list(option.hint) or word in choices:
            return word
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(word)
                except ValueError:
                    pass
        raise _WrongValue(f"{option.typed} is {word!r}; expected {type_text(option.hint)}")

    return read


class _WrongValue(Exception):
    """A word that an option does not take; argparse lets it pass as it is."""


def type_text(hint: Any) -> str:
    """A type in words."""
    choices = _choices(hint)
    words = [f"{'one of ' * (len(choices) > 1)}{', '.join(choices)}"] if choices else []
    words += [{int: "a whole number", float: "a number"}[kind] for kind in _parts(hint) if kind in (int, float)]
    return " or ".join(words)


def parse(function: Callable[..., Any], prog: str, argv: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `function` from a command line.

    Raises:
        ValueError: unknown option (the closest one is named), missing option, or a value of the wrong type or range.
        SystemExit: after printing the help text for --help.
    """
    options = options_of(function)
    known = [option.typed for option in options if not option.positional]
    unknown = [word.split("=", 1)[0] for word in argv if word.startswith("--")]
    unknown = [word for word in unknown if word not in {*known, "--help"}]
    if unknown:
        raise ValueError(f"{prog} has no option {unknown[0]}; {closest(unknown[0], known)}")
    try:
        values = vars(build_parser(function, prog).parse_args(argv))
    except _WrongValue as error:
        raise ValueError(f"{error}. See {prog} --help.") from error
    missing = [option.typed for option in options if values[option.name] in (MISSING, [])]
    if missing:
        raise ValueError(f"{prog} needs {' and '.join(missing)}. See {prog} --help.")
    return _arguments(function, options, values)


def _arguments(
    function: Callable[..., Any], options: list[Option], values: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The values typed, as the function takes them."""
    hints = typing.get_type_hints(function)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = group_of(hints[name])
        value = values.get(name)
        if group is not None:
            value = _group(group, {o.name: values[o.name] for o in options if o.group == name}, parameter)
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value or []
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    return positional, keywords


def _group(group: type, values: dict[str, Any], parameter: inspect.Parameter) -> Any:
    """The object; None for a group that may be left out and was. Raises ValueError where a part of it was."""
    required = [field.name for field in fields(group) if field.default is MISSING]
    if parameter.default is not None or any(values[name] is not None for name in required):
        return group(**values)
    optional = [field for field in fields(group) if field.name not in required]
    if given := [field.name for field in optional if values[field.name] != field.default]:
        typed = ["--" + name.replace("_", "-") for name in (given[0], *required)]
        raise ValueError(f"{typed[0]} is given without {' and '.join(typed[1:])}; add it.")
    return None
