"""Nested options given as plain dictionaries, from Python: read by the rules, and refused in the words, of a YAML."""

from __future__ import annotations

import argparse
import typing
from typing import Any

from jsonargparse import ArgumentParser

from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.training.config import TYPES
from flashar_pl.training.words import DEFAULT_DATA, Words, check_keys, explain


def typed_options(owner: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `owner`, with an object in place of each dictionary of options.

    Raises:
        ValueError: an unknown key (the closest ones are named) or a value of the wrong type, as `flashar fit` says it.
    """
    given = {name: value for name, value in arguments.items() if name in TYPES and isinstance(value, dict)}
    if not given:
        return arguments
    check_keys(Words(({"model": given},), ()), owner, {DEFAULT_DATA: CodesDataModule})
    hints = typing.get_type_hints(owner.__init__)  # type: ignore[misc]
    parser = ArgumentParser(exit_on_error=False)
    for name in given:
        parser.add_argument(f"--model.{name}", type=hints[name])
    try:
        # the second is the name before jsonargparse 4.49
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(parser.parse_object({"model": given}))
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    return arguments | {name: made["model"][name] for name in given}
