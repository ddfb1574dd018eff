"""`flashar reproduce`: the commands behind every row of the paper's tables and figures."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashar_pl.commands.demo import Stage, run_process
from flashar_pl.console import closest, table
from flashar_pl.recipes import find_recipe
from flashar_pl.text_files import read_yaml

TABLES = "experiments/paper/tables.yaml"
CONTINUED = ("fit", "tokenize")
"""Commands that leave what is finished alone, whatever is there; others are left out where their result is."""


@dataclass(frozen=True)
class Row:
    """One row of a table or figure."""

    paper: dict[str, str]
    """The paper's numbers by column."""
    needs: dict[str, str]
    """File or folder that has to be there -> where it comes from."""
    steps: list[Stage]
    """In their order."""


def reproduce(what: str, /, *, row: str | None = None, run: bool = False) -> list[list[str]]:
    """Print the commands that measure a row of the paper, and with --run run them.

    Without a row, the rows of the table are listed with the paper's numbers. Weights and data are never fetched: what
    is not here is named with where it comes from. Steps whose result is there are left out. Our numbers beside the
    paper's, and at which scale they were measured: docs/results/README.md.

    Example:
        flashar reproduce table1
        flashar reproduce table1 --row llamagen-l-flashar

    Args:
        what: table1 to table5, figure1, figure3, figure4a, figure4b, figure5 or figure6.
        row: one of its rows.
        run: run the commands, one after the other.
    """
    tables = read_tables()
    if what not in tables:
        raise ValueError(f"no table {what!r}; known: {', '.join(tables)}.")
    rows, content = tables[what]["rows"], tables[what]
    if row is None:
        if run:
            raise ValueError(f"--run needs --row, one of {', '.join(rows)}.")
        print(f"{what}: {content['title']} (the paper's numbers)\n")
        print(
            table(["row", *content["columns"]], [[name, *map(str, one.paper.values())] for name, one in rows.items()])
        )
        return []
    if row not in rows:
        raise ValueError(f"{what} has no row {row!r}; {closest(row, rows)} Known: {', '.join(rows)}.")
    return _show(rows[row], f"{what}, {row}", run)


def _show(row: Row, title: str, run: bool) -> list[list[str]]:
    """Print a row's commands, what is missing here and the paper's numbers; run them."""
    missing = [f"{name} ({where})" for name, where in row.needs.items() if not Path(name).exists()]
    print("\n".join(f"flashar {shlex.join(stage.words)}" for stage in row.steps))
    numbers = ", ".join(f"{name} {value}" for name, value in row.paper.items())
    print("\n".join([f"\nthe paper's {title}: {numbers}", *(f"missing here: {each}" for each in missing)]))
    if run and missing:
        raise ValueError(f"{title} needs {'; '.join(missing)}.")
    for stage in row.steps if run else []:
        if stage.words[0] not in CONTINUED and stage.done:
            print(f"{stage.path} is there and kept")
        elif code := run_process(stage):
            raise ValueError(f"`flashar {stage.words[0]}` ended with exit code {code}; its message is above.")
    return [stage.words for stage in row.steps]


def read_tables() -> dict[str, dict[str, Any]]:
    """Table or figure -> its title, its columns and its rows."""
    content = read_yaml(find_recipe(TABLES))
    tables = {
        name: {**given, "rows": {key: _row(content, given, values) for key, values in given["rows"].items()}}
        for name, given in content["tables"].items()
    }
    rows = {f"{name} --row {key}": row for name, given in tables.items() for key, row in given["rows"].items()}
    makers = {stage.path: key for key, row in reversed(rows.items()) for stage in row.steps}  # the first row wins
    for row in rows.values():
        for name in row.needs.keys() - content["where"].keys():
            maker = next(makers[place] for place in Path(name).parents if place in makers)
            row.needs[name] = f"flashar reproduce {maker}"
    return tables


def _row(content: dict[str, Any], given: dict[str, Any], values: dict[str, Any]) -> Row:
    paper = dict(zip(given["columns"], values["paper"].split(), strict=True))
    chain, words = content["chains"][values["chain"]], {**content["words"], **values}

    def filled(text: str) -> str:
        return text.format_map(words)

    needs = [filled(name) for name in _flat(chain["needs"])]
    steps = [Stage(name, 0, shlex.split(filled(text)), Path(filled(name))) for name, text in chain["steps"].items()]
    return Row(paper, {name: content["where"].get(name, "") for name in needs}, steps)


def _flat(names: list[Any]) -> list[str]:
    return [each for name in names for each in (_flat(name) if isinstance(name, list) else [name])]
