"""Command line of a typed function: options from its signature, help text from its docstring.

Positional-only parameters become positional arguments, keyword-only parameters become options (`num_images` is typed
`--num-images`), parameters without a default are required, booleans are switches. A union that contains `str` is read
as text. The docstring has a summary, an explanation, `Example:` and `Args:`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import docstring_parser
from jsonargparse import ArgumentParser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wide help lines; the alias that jsonargparse adds for lists is not shown."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {action.metavar}"


def build_parser(function: Callable[..., Any], prog: str) -> ArgumentParser:
    """The parser of `flashar VERB` for a command function. Every parameter must have a line in the docstring."""
    doc = docstring_parser.parse(function.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    described = {param.arg_name: " ".join((param.description or "").split()) for param in doc.params}
    examples = "\n\n".join(_as_typed(example.description or "") for example in doc.examples)
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    parser = ArgumentParser(
        prog=prog,
        usage=_usage(prog, parameters),
        description=inspect.cleandoc((function.__doc__ or "").split("Example")[0].split("Args:")[0]),
        epilog=f"example:\n  {examples.replace(chr(10), chr(10) + '  ')}" if examples else None,
        formatter_class=_Help,
        exit_on_error=False,
    )
    for name, parameter in parameters.items():
        assert name in described, f"{function.__name__}: parameter {name} has no description"
        _add(parser, parameter, hints[name], described[name])
    return parser


def _as_typed(example: str) -> str:
    """An example that a shell takes as it is: a line that starts no command continues the one before it."""
    lines: list[str] = []
    for line in example.splitlines():
        if lines and not line.startswith(("flashar ", "torchrun ")):
            lines[-1] += " \\"
            line = "  " + line.strip()
        lines.append(line)
    return "\n".join(lines)


def _usage(prog: str, parameters: typing.Mapping[str, inspect.Parameter]) -> str:
    words = [prog]
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            words.append(f"{name.upper()} [{name.upper()} ...]")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            words.append(name.upper())
        elif parameter.default is parameter.empty:
            words.append(f"{option(name)} {name.upper()}")  # required options are text
    return " ".join([*words, "[options]"])


def option(name: str) -> str:
    """How a parameter is typed: num_images -> --num-images."""
    return "--" + name.replace("_", "-")


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    hint = _readable(hint)
    choices = _choices(hint)
    other = ["N"] if choices and int in typing.get_args(hint) else []
    metavar = "{" + ",".join([*choices, *other]) + "}" if choices else _metavar(parameter.name, hint)
    text = text.replace("%", "%%")
    if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
        nargs = "+" if parameter.kind is parameter.VAR_POSITIONAL else None
        parser.add_argument(parameter.name, type=hint, metavar=parameter.name.upper(), help=text, nargs=nargs)
    elif list[str] in typing.get_args(hint):
        parser.add_argument(option(parameter.name), action="append", metavar=metavar, help=text)
    elif hint is bool:
        parser.add_argument(option(parameter.name), action="store_true", help=text)
    elif parameter.default is parameter.empty:
        parser.add_argument(option(parameter.name), type=hint, required=True, metavar=metavar, help=f"{text} Required.")
    else:
        shown = text if parameter.default is None else f"{text} Default: {parameter.default}."
        parser.add_argument(option(parameter.name), type=hint, default=parameter.default, metavar=metavar, help=shown)


def _readable(hint: Any) -> Any:
    """The type the command line reads: text where a union allows it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and str in typing.get_args(hint):
        return str | None if type(None) in typing.get_args(hint) else str
    return hint


def _metavar(name: str, hint: Any) -> str:
    """N for a whole number, X for a number, otherwise the parameter's name."""
    kinds = typing.get_args(hint) or (hint,)
    return "N" if int in kinds else "X" if float in kinds else name.upper()


def _choices(hint: Any) -> list[str]:
    """The values of a Literal, also inside an optional."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def parse(function: Callable[..., Any], prog: str, argv: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `function` from a command line.

    Raises:
        ValueError: unknown option (the closest one is named), missing option, or a value of the wrong type.
        SystemExit: after printing the help text for --help.
    """
    parser = build_parser(function, prog)
    hints = typing.get_type_hints(function)
    known = [option(name) for name in hints if name != "return"]
    unknown = [word for word in argv if word.startswith("--") and _name(word) not in {*known, "--help"}]
    if unknown:
        raise ValueError(f"{prog} has no option {_name(unknown[0])}; {closest(_name(unknown[0]), known)}")
    try:
        values = vars(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise ValueError(_explain(str(error), function, prog)) from error
    positional: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(values.pop(name))
        elif parameter.kind is parameter.VAR_POSITIONAL:
            positional += values.pop(name)
    return positional, values


def _name(word: str) -> str:
    return word.split("=", 1)[0]


def _explain(message: str, function: Callable[..., Any], prog: str) -> str:
    """One line for jsonargparse's message."""
    hints = typing.get_type_hints(function)
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    key = re.match(r'Parser key "(\w+)"', message)
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    if key and given and key[1] in hints:
        hint = hints[key[1]]
        choices = _choices(hint)
        expected = f"one of {', '.join(choices)}" if choices and int not in typing.get_args(hint) else type_text(hint)
        return f"{option(key[1])} is {given[1]!r}; expected {expected}. See {prog} --help."
    missing = re.match(r"the following arguments are required: (.+)", message)
    if missing:
        words = missing[1].split(", ")
        names = [option(word) if kinds.get(word) is inspect.Parameter.KEYWORD_ONLY else word.upper() for word in words]
        return f"{prog} needs {' and '.join(names)}. See {prog} --help."
    return f"{' '.join(message.split())}. See {prog} --help."


def type_text(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", type(None): "nothing"}
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    return " or ".join(words.get(part) or ", ".join(_choices(part)) or str(part) for part in parts)


def closest(word: str, known: typing.Iterable[str]) -> str:
    """'did you mean ...?' with the nearest known names, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
