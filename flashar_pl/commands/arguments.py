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
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from typing import Any, Literal

from flashar_pl.console import closest


@dataclass(frozen=True)
class Option:
    """One option or positional argument."""

    name: str
    hint: Any
    text: str
    default: Any
    """MISSING = it must be given."""
    positional: bool
    group: str | None = None
    """Parameter of the function that holds it; None = it is a parameter itself."""
    title: str | None = None
    """Heading in the help."""
    many: bool = False
    """Whether the positional argument is a list."""

    @property
    def typed(self) -> str:
        """How it is typed: num_images -> --num-images."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def kinds(self) -> list[Any]:
        """The types of a union; one type otherwise."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return [part for part in typing.get_args(self.hint) if part is not type(None)] if union else [self.hint]

    @property
    def choices(self) -> list[str]:
        """The values of a Literal, also inside a union."""
        return [str(v) for kind in self.kinds if typing.get_origin(kind) is Literal for v in typing.get_args(kind)]

    @property
    def metavar(self) -> str:
        """N for a whole number, X for a number, {a,b} for a choice, otherwise the option's name."""
        if self.choices:
            return "{" + ",".join(self.choices + ["N"] * (int in self.kinds)) + "}"
        return "N" if int in self.kinds else "X" if float in self.kinds else self.name.upper()

    def read(self, given: Any) -> Any:
        """The value of a typed word; what is no word (a default, a switch, a list) stays. ValueError: another type."""
        if not isinstance(given, str) or str in self.kinds or given in self.choices:
            return given
        for kind in (int, float):
            if kind in self.kinds:
                with suppress(ValueError):
                    return kind(given)
        words = [f"{'one of ' * (len(self.choices) > 1)}{', '.join(self.choices)}"] if self.choices else []
        words += [{int: "a whole number", float: "a number"}[kind] for kind in self.kinds if kind in (int, float)]
        raise ValueError(f"{self.typed} is {given!r}; expected {' or '.join(words)}.")


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


def options_of(function: Callable[..., Any]) -> list[Option]:
    """Everything that can be typed after the command, in the order of the signature."""
    found: list[Option] = []
    hints, texts = typing.get_type_hints(function), _sections(function)[2]
    for name, parameter in inspect.signature(function).parameters.items():
        hint, many = hints[name], parameter.kind is parameter.VAR_POSITIONAL
        positional = many or parameter.kind is parameter.POSITIONAL_ONLY
        preset = MISSING if parameter.default is parameter.empty else parameter.default
        is_group = is_dataclass(hint)
        if not is_group:
            assert name in texts, f"{function.__name__}: parameter {name} has no description"
            found.append(Option(name, hint, texts[name], preset, positional, many=many))
            continue
        types_, told = typing.get_type_hints(hint), field_texts(hint)
        title = inspect.cleandoc(hint.__doc__ or "").split("\n")[0].rstrip(".").lower()
        for field in fields(hint):
            assert field.name in told, f"{hint}.{field.name} has no description"
            default = field.default if preset is MISSING else getattr(preset, field.name)
            bare = positional and default is MISSING
            found.append(Option(field.name, types_[field.name], told[field.name], default, bare, name, title))
    names = [option.name for option in found]
    assert len(names) == len(set(names)), f"{function.__name__} declares an option twice: {sorted(names)}"
    return found


def build_parser(function: Callable[..., Any], prog: str) -> argparse.ArgumentParser:
    """The parser of `flashar VERB` for a command function. It leaves words as they are typed."""
    options = options_of(function)
    explanation, example, _ = _sections(function)
    parser = _Parser(
        prog=prog,
        usage=_usage(prog, options),
        description=explanation,
        epilog=f"example:\n{textwrap.indent(_as_typed(example), '  ')}" if example else None,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110),
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
        if lines and not line.startswith(("flashar ", "torchrun ", "curl ")):
            lines[-1] += " \\"
            line = "  " + line.strip()
        lines.append(line)
    return "\n".join(lines)


def _usage(prog: str, options: list[Option]) -> str:
    words = [prog]
    for option in options:
        if option.positional:
            words.append(f"{option.typed} [{option.typed} ...]" if option.many else option.typed)
        elif option.required:
            words.append(f"{option.typed} {option.metavar}")
    return " ".join([*words, "[options]"])


def _add(parser: Any, option: Option) -> None:
    text = option.text.replace("%", "%%")
    if option.positional:
        nargs = "*" if option.many else "?"  # `parse` says what is missing
        parser.add_argument(option.name, metavar=option.typed, help=text, nargs=nargs, default=MISSING)
        return
    if option.hint is bool:
        parser.add_argument(option.typed, action="store_true", help=text)
        return
    if option.required:
        text += " Required."
    elif option.default is not None and "Default:" not in text:
        text += f" Default: {option.default}."
    several = str not in option.kinds and any(typing.get_origin(kind) is list for kind in option.kinds)
    action = "append" if several else "store"
    parser.add_argument(option.typed, action=action, default=option.default, metavar=option.metavar, help=text)


ELSEWHERE = {
    "--guidance-scale": "--cfg-scale", "--guidance": "--cfg-scale", "--cfg": "--cfg-scale", "--model": "--checkpoint",
    "--ckpt": "--checkpoint", "--num-images-per-prompt": "--num-images", "--num-samples": "--num-images",
    "--class": "--classes", "--labels": "--classes", "--output": "--out", "--output-dir": "--out",
    "--bs": "--batch-size", "--precision": "--dtype", "--text": "--prompt", "--shards": "--data",
    "--vae": "--tokenizer",
}  # fmt: skip
"""What other programs call an option -> its name here."""


def _in_our_words(word: str, known: list[str]) -> str:
    """An option typed with underscores, or by Lightning's name for --checkpoint, as it is declared."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = name.replace("_", "-")
    if name == "--ckpt-path" and "--checkpoint" in known:
        name = "--checkpoint"
    return f"{name}{equals}{value}"


def _suggested(typed: str, known: list[str]) -> str:
    """What may have been meant, the likeliest first."""
    meant = ELSEWHERE.get(typed)
    if meant in known:
        return f"did you mean {meant}?"
    longer = [name for name in known if name.startswith(typed)]
    return f"did you mean {' or '.join(longer[:3])}?" if longer and len(typed) > 3 else closest(typed, known)


def parse(function: Callable[..., Any], prog: str, argv: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `function` from a command line.

    Raises:
        ValueError: unknown option (the closest one is named), missing option, or a value of the wrong type or range.
        SystemExit: after printing the help text for --help.
    """
    options = options_of(function)
    known = [option.typed for option in options if not option.positional]
    argv = [_in_our_words(word, known) for word in argv]
    for word in argv:
        typed = word.split("=", 1)[0]
        if typed.startswith("--") and typed not in (*known, "--help"):
            raise ValueError(f"{prog} has no option {typed}; {_suggested(typed, known)}")
    words = vars(build_parser(function, prog).parse_args(argv))
    if missing := [option.typed for option in options if words[option.name] in (MISSING, [])]:
        raise ValueError(f"{prog} needs {' and '.join(missing)}. See {prog} --help.")
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        own = {each.name: each.read(words[each.name]) for each in options if (each.group or each.name) == name}
        is_group = is_dataclass(hints[name])
        value = hints[name](**own) if is_group else own[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    return positional, keywords
