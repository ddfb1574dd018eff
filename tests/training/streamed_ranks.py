"""What either rank of test_streamed_recipes.py does."""

from __future__ import annotations

import os

from flashar_pl.cli import main


def fit_all(place: str, runs: list[list[str]]) -> list[int]:
    """The command line `flashar fit` for each list of words, in one directory; exit codes."""
    before = os.getcwd()
    os.chdir(place)
    try:
        return [main(["fit", *words]) for words in runs]
    finally:
        os.chdir(before)
