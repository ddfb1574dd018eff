"""Every command that a page shows is one that its parser takes: verbs, options and values, without running it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashar_pl.cli import COMMANDS, load, split_verb
from flashar_pl.commands.arguments import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.yaml"))]
PAGES = [page for page in PAGES if page.name != "log.md"]  # that page says what was typed then


def code(page: Path) -> str:
    """The text of a page; of a YAML what its comments say."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^# ?", "", text, flags=re.MULTILINE) if page.suffix == ".yaml" else text


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: lines of code that begin with `flashar`, continued by a backslash."""
    for found in re.finditer(
        r"^(?: {2,}|\t)?(?:\.venv/bin/)?flashar +(\S(?:.|\\\n)*)$", text.replace("\\\n", " "), re.MULTILINE
    ):
        words = shlex.split(found[1], comments=True)
        end = next((i for i, word in enumerate(words) if word in ("|", "&&", ">", ";", "&")), len(words))
        yield words[:end]


def parse_words(words: list[str]) -> None:
    """Parse a command without running it. Raises ValueError or SystemExit where it would be refused."""
    if words[0] in COMMANDS and COMMANDS[words[0]].trains:
        from flashar_pl.training.lightning_cli import ExperimentCLI

        words = [PLACEHOLDERS.get(word, word) for word in words]
        if "--checkpoint" in words:  # no such file here; it holds the settings of the run
            at = words.index("--checkpoint")
            config = [] if "--config" in words else ["--config", str(ROOT / "experiments/demo_flashar.yaml")]
            words[at : at + 2] = config
        ExperimentCLI(words[0], words[1:], parse_only=True)
    else:
        name, rest = split_verb(words)
        parse(load(COMMANDS[name]), f"flashar {name}", rest)


PLACEHOLDERS = {"SEED": "0", "STATE": "fp32", "FACTOR": "0.2"}
FOUND = [(page.name, words) for page in PAGES for words in commands(code(page))]


def test_pages_show_commands() -> None:
    assert len(FOUND) > 60
    assert sum(words[0] in ("fit", "validate", "test", "predict") for _, words in FOUND) > 20


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}:{' '.join(words)[:60]}" for page, words in FOUND])
def test_a_command_is_taken(page: str, words: list[str]) -> None:
    parse_words(words)
