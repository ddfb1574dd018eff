"""What the pages name is there: files, links, make targets, functions, commands written within a sentence."""

import re
import tomllib
from pathlib import Path

import pytest

from flashar_pl.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md", "benchmarks/README.md", *DOCS]
FOLDERS = r"(?:tests|flashar_pl|docs|experiments|benchmarks)"
MADE = {"docs/log.md"}
"""Pages that may name what is no more."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in MADE])
def test_named_files_and_targets_exist(page: str) -> None:
    text = text_of(page)
    named = set(re.findall(rf"`({FOLDERS}/[\w./]*\w/?)`", text))
    assert not [path for path in named if not (ROOT / path).exists()]
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)|^    make ([a-z-]+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text_of(page))
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_sentence_exist(page: str) -> None:
    verbs = {name.split()[0] for name in COMMANDS}
    named = set(re.findall(r"`flashar ([a-z]\w*)", text_of(page)))
    assert named <= verbs


def test_functions_stand_in_the_files_that_the_method_names() -> None:
    """Guards the map from equations to code: `generate` once stood there with the wrong file."""
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]+\.py`[^|]*)\|([^|]+)\|$", text_of("docs/method.md"), re.MULTILINE)
    assert len(rows) >= 14
    for files, names in rows:
        code = "".join(text_of(f"flashar_pl/{file}") for file in re.findall(r"`([\w/]+\.py)`", files))
        for name in re.findall(r"`([A-Za-z_][\w.]*)[^`]*`", names):
            for part in name.split("."):
                assert name == "flashar" or re.search(rf"^ *(?:(?:def|class) |self\.){part}\b", code, re.MULTILINE), (
                    name,
                    files,
                )


def test_the_map_shows_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+)\)", text_of("docs/index.md")))
    assert {page.removeprefix("docs/") for page in DOCS} - {"index.md"} <= linked


def test_rooms_stand_in_the_order_of_the_contract() -> None:
    """Guards the table of rooms: a module that is gone, or that may not be imported from where the table says."""
    contract = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [set(layer.replace("flashar_pl.", "").split(" | ")) for layer in reversed(contract)]
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text_of("CONTRIBUTING.md"), re.MULTILINE)
    rooms = [set(re.findall(r"\w+", row)) for row in table]
    assert len(rooms) == len(layers)
    assert all(room <= layer for room, layer in zip(rooms, layers, strict=True)), rooms
