"""What several commands need: outputs that appear complete or not at all, versions, grids and tokenizers as text.

Standard library only at module level: every `--help` imports this file.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_CODES = 2**16
"""Largest grid that is taken for meant: 256 x 256 codes are 4,096 x 4,096 pixels."""
LINE_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal."""


class Missed(Exception):
    """A run was sound but missed a stated bound; the command exits with 1."""


def require_new(path: str | Path, what: str) -> Path:
    """`path`, if nothing is there yet and it can be made. Raises ValueError otherwise, before the work is done."""
    target = Path(path)
    if target.exists():
        raise ValueError(f"{target} exists; the {what} would overwrite it. Choose another --out or remove it.")
    there = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"the {what} cannot be written to {target}: {error.strerror or error} ({there}). Choose another --out."
        ) from error
    return target


@contextmanager
def new_directory(path: str | Path, what: str) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        ValueError: `path` exists.
    """
    target = require_new(path, what)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield part
        require_new(target, what)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a file under a temporary name, then rename it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(target)
    return target


def write_json(path: str | Path, values: dict[str, Any]) -> Path:
    """Write a JSON file under a temporary name, then rename it."""
    return write_text(path, json.dumps(values, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import numpy
    import torch

    from flashar_pl import __version__

    return {
        "flashar-pl": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def parse_grid(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """ "16x24" or "16" (a square) as (H, W). Raises ValueError for anything else."""
    if text is None or isinstance(text, tuple):
        return text
    sides = str(text).lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"grid is {text!r}; expected HEIGHTxWIDTH such as 16x16, or one side of a square.")
    height, width = int(sides[0]), int(sides[-1])
    if height * width > MOST_CODES:
        raise ValueError(
            f"grid is {text!r}, {height * width:,} codes; expected at most {MOST_CODES:,}, in codes, not pixels."
        )
    return height, width


def parse_tokenizer(text: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """ "pixels:17", "vq16:FILE", "ibq:FILE", a directory (Emu3.5's tokenizer) or a JSON object, as the argument of
    `build_tokenizer`."""
    if text is None or isinstance(text, dict):
        return text
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--tokenizer {text!r} is not JSON: {error}") from error
    if Path(text).expanduser().is_dir():
        return {"kind": "ibq", "weights": text}
    kind, _, value = text.partition(":")
    if not value:
        raise ValueError(f"tokenizer is {text!r}; expected KIND:VALUE such as vq16:vq_ds16_c2i.pt or pixels:17.")
    if kind == "pixels":
        if not value.isdigit():
            raise ValueError(f"tokenizer is {text!r}; expected pixels:LEVELS such as pixels:17.")
        return {"kind": kind, "levels": int(value)}
    return {"kind": kind, "weights": value}


def parse_classes(classes: str | list[int] | int) -> list[int]:
    """ "3,7", "0-9" or a list of ints as class ids. Raises ValueError for anything else."""
    if not isinstance(classes, str):
        return [classes] if isinstance(classes, int) else [int(c) for c in classes]
    ids: list[int] = []
    for part in classes.strip("[] ").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(first) <= int(last))):
            raise ValueError(f"classes is {classes!r}; expected ids such as 3,7 or a range such as 0-9.")
        ids += range(int(first), int(last or first) + 1)
    return ids


def first_line(error: BaseException) -> str:
    """Of an error's message; the name of its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def plural(n: int, noun: str) -> str:
    """ "1 sample", "1,200 samples"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


class progress_bar:
    """A progress bar on stderr whose target is a callable: `with progress_bar(n, unit) as advance: advance(1)`.

    Where stderr is no terminal, a line every `LINE_EVERY` seconds.
    """

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, disable=None)
        self._total, self._unit, self._done = total, unit, 0
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Callable[[int], Any]:
        return self._advance

    def _advance(self, n: int) -> None:
        self._bar.update(n)
        self._done += n
        now = time.monotonic()
        if self._bar.disable and self._done < self._total and now - self._last > LINE_EVERY:
            self._last = now
            left = (now - self._began) / self._done * (self._total - self._done)
            print(f"{self._done:,} of {self._total:,} {self._unit}, {left:.0f} s left", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
