"""The container file copies all that the installation needs, and nothing that is not there."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_container_has_what_the_build_reads() -> None:
    """Guards a file that pyproject.toml names and the Dockerfile or its ignore list leaves out."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = {word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {settings["project"]["readme"], *settings["project"]["license-files"], *wheel["packages"]}
    read |= {*wheel["force-include"], "pyproject.toml", "constraints.txt"}
    assert read <= copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept


def test_the_container_has_a_python_that_is_supported() -> None:
    version = re.search(r"^FROM python:(\d+)\.(\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version is not None
    assert project["requires-python"] == ">=3.11"
    assert (int(version[1]), int(version[2])) >= (3, 11)
