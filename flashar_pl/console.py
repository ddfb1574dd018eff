"""What people see in a terminal: progress, tables, counts.

Standard library only at module level: every `--help` imports this file.
"""

from __future__ import annotations

import difflib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

LINE_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal."""


class Missed(Exception):
    """A run was sound but missed a stated bound; the command exits with 1."""


class progress_bar:
    """A progress bar on stderr whose target is a callable: `with progress_bar(n, unit) as advance: advance(1)`.

    Where stderr is no terminal, a line every `LINE_EVERY` seconds. done: what was there before this run.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, disable=None)
        self._total, self._unit, self._done, self._before = total, unit, done, done
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Callable[[int], Any]:
        return self.advance

    def advance(self, n: int, **shown: Any) -> None:
        """n more are done; numbers to show beside the bar, read only where there is one."""
        if shown and not self._bar.disable:
            self._bar.set_postfix({name: f"{float(value):.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(n)
        self._done += n
        now = time.monotonic()
        if self._bar.disable and self._before < self._done < self._total and now - self._last > LINE_EVERY:
            self._last = now
            rate = (self._done - self._before) / (now - self._began)
            left = timedelta(seconds=round((self._total - self._done) / rate))
            news = f"{self._done:,} of {self._total:,} {self._unit}, {rate:.3g} {self._unit}/s, {left} left"
            print(news, file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Imports of packages that only `what` needs. Raises ValueError with what to install where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} needs {error.name}: pip install 'flashar-pl[{extra}]'") from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = (cell.rjust(widths[i]) if i else cell.ljust(widths[0]) for i, cell in enumerate(cells))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(row(cells) for cells in (header, rule, *rows))


def plus_minus(value: float, error: float | None, digits: str, of_error: str | None = None) -> str:
    """A number with what it may be off, None = not known. digits: such as .2f, and those of the error if others."""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:{of_error or digits.removeprefix('+')}}")


def first_line(error: BaseException) -> str:
    """Of an error's message; the name of its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import numpy
    import torch

    from flashar_pl import __version__

    return {
        "flashar-pl": __version__,
        **code_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@cache
def code_version() -> dict[str, str]:
    """The commit this runs from, with "-dirty" where files differ from it; nothing outside a git checkout."""
    root = Path(__file__).parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}


def closest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest known names, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
