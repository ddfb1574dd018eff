"""Extras are optional: importing any file of the package needs what pyproject.toml always installs, and no more."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}
OPTIONAL = {"flashar_pl/serving/": {"starlette"}, "flashar_pl/layers/kernels/": {"triton"}}
"""Folders that import an extra: commands/serve.py imports the first under `needing`, runner fused the second where
`kernels.launch.why_not` allows it."""


def at_import(body: list[ast.stmt]) -> Iterator[str]:
    """Packages that statements import when a file is imported."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.split(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield (statement.module or "").split(".")[0]
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(statement, part, []))


def test_extras_are_imported_where_they_are_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", needed)[0] for needed in project["dependencies"]}
    always = {IMPORTED_AS.get(name, name) for name in names} | {"flashar_pl", *sys.stdlib_module_names}
    found = {
        (str(file.relative_to(ROOT)), package)
        for file in (ROOT / "flashar_pl").rglob("*.py")
        for package in at_import(ast.parse(file.read_text()).body)
    }
    extra = {(file, package) for file, package in found if package not in always}
    for folder, packages in OPTIONAL.items():
        assert {package for file, package in extra if file.startswith(folder)} == packages
    assert not {(file, package) for file, package in extra if not file.startswith(tuple(OPTIONAL))}
