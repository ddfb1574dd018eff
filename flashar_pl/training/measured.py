"""What `flashar validate`, `test` and `predict` found: a table of rounded numbers, and a JSON file with all digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashar_pl.console import table, versions
from flashar_pl.files import write_json

DIGITS = 5
"""Shown of a number."""


def report(verb: str, metrics: Mapping[str, Any], target: Path, facts: Mapping[str, Any]) -> None:
    """Print the numbers and write them to `target`, a new file. facts: what they were measured on."""
    numbers = {name: float(value) for name, value in sorted(metrics.items())}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"command": verb, "metrics": numbers, **facts, "versions": versions()})
    print(table(("metric", "value"), [[name, rounded(value)] for name, value in numbers.items()]))
    print(f"wrote {target}")


def rounded(value: float) -> str:
    """A number as people read it; whole ones, such as counts, in full."""
    return f"{value:,.0f}" if value.is_integer() else f"{value:.{DIGITS}g}"
