"""The recipes of experiments/, wherever the package is: beside it in a checkout, inside it where it was installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

FOLDER = "experiments"


def recipes() -> list[Path]:
    """The YAML files of experiments/."""
    package = Path(str(files("flashar_pl")))
    return next((found for place in (package, package.parent) if (found := [*(place / FOLDER).glob("*.yaml")])), [])


def find_recipe(name: str | Path) -> Path:
    """The file of that name; where there is none, for experiments/NAME, the one that came with the package."""
    given = Path(name).expanduser()
    if given.parts[:1] != (FOLDER,) or ".." in given.parts or given.exists():
        return given
    package = Path(str(files("flashar_pl")))
    own = (place / given for place in (package, package.parent))
    return next((path for path in own if path.is_file()), given)
