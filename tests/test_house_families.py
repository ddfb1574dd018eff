"""No code above the backbones names a concrete family of them: it asks the backbone.

Documentation may name families: docstrings, and the texts under fields, which are the help of options.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashar_pl"
ROOMS = ("backbones", "checkpoints", "tokenizers")
"""Where families have their files, weights, and image and text tokenizers."""
FAMILY = re.compile(r"llama ?gen|emu ?3\.?5", re.IGNORECASE)


def mentions(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier, import and string constant that names a family."""
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        words = [getattr(node, name, None) for name in ("id", "attr", "name", "asname", "arg", "module")]
        if isinstance(node, ast.Constant) and id(node) not in documentation:
            words.append(node.value)
        for word in words:
            if isinstance(word, str) and FAMILY.search(word):
                yield getattr(node, "lineno", 0), word


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in ROOMS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_family_is_named(path: Path) -> None:
    assert list(mentions(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from flashar_pl.backbones import Emu35",
        "import flashar_pl.backbones.llamagen as x",
        "isinstance(model, LlamaGen)",
        "x.is_emu35()",
        "def f(llamagen=None): ...",
        "raise ValueError(f'{x} is no Emu3.5 model')",
        "kind == 'llamagen'",
    ],
)
def test_the_rule_above_can_fail(line: str) -> None:
    assert list(mentions(line))
    assert not list(mentions(f'"""{line}"""\nclass A:\n    x: int = 1\n    """{line}"""'))
