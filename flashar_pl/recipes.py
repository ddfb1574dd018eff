"""The recipes of experiments/, wherever the package is: beside it in a checkout, inside it where it was installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

FOLDER = "experiments"


def recipes() -> list[Path]:
    """The YAML files of experiments/."""
    return [*find_recipe(FOLDER, here=False).glob("*.yaml")]


def find_recipe(name: str | Path, here: bool = True) -> Path:
    """The path of that name; where there is none, for experiments/NAME, the one that came with the package."""
    given, package = Path(name).expanduser(), Path(str(files("flashar_pl")))
    if given.parts[:1] != (FOLDER,) or ".." in given.parts or (here and given.exists()):
        return given
    return next((path for place in (package, package.parent) if (path := place / given).exists()), given)
