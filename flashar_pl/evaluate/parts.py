"""The samples of an evaluation on disk: one part file per batch, so that a killed run continues where it was.

A part appears under its name complete or not at all, and its contents do not depend on which process wrote it.

Shapes: b samples of a batch, H x W grid, D pooled features, S spatial features, C classes, h x w pixels.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashar_pl import locks
from flashar_pl.decoding.samples import Drawn
from flashar_pl.evaluate.identity import SETTINGS, check_folder, check_settings
from flashar_pl.files import replacing, write_json
from flashar_pl.integrity import check_safetensors
from flashar_pl.metrics.extractor import Features
from flashar_pl.tensor_files import read_tensors, save_checked

PARTS, RESULT, LOCK = "parts", "evaluation.json", ".lock"


class PartFolder:
    """The directory of one evaluation: `settings.json` and `parts/` while samples are drawn, then `evaluation.json`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.parts = self.path / PARTS
        self._lock: IO[str] | None = None

    def check(self) -> None:
        """ValueError unless the directory is new or holds an unfinished evaluation."""
        if (self.path / RESULT).exists():
            raise ValueError(f"{self.path} holds a finished evaluation; choose another --out or remove it.")
        check_folder(self.path)

    def open(self, identity: dict[str, Any], batches: int) -> int:
        """Make the directory or continue in it, and hold it; returns how many parts are there.

        Raises ValueError where it holds samples of another identity, or another run draws into it.
        """
        self.check()
        check_settings(self.path, identity)
        if not (self.path / SETTINGS).exists():  # before all else: without it, what a full disk leaves is nobody's
            write_json(self.path / SETTINGS, identity)
        self.parts.mkdir(exist_ok=True)
        self._lock = locks.lock_file(self.path / LOCK)  # held, not only opened: closing it lets go of the lock
        try:
            locks.take(self._lock)
        except BlockingIOError as error:
            raise ValueError(f"another process is drawing samples into {self.path}.") from error
        check_settings(self.path, identity)  # one that began at the same time may have written others
        return sum(self.has(batch) for batch in range(batches))

    def file(self, batch: int) -> Path:
        """Where the part of a batch is stored."""
        return self.parts / f"{batch:06d}.safetensors"

    def has(self, batch: int) -> bool:
        """Whether the part of a batch is there, as it was written: one that a disk has damaged is drawn again."""
        try:
            check_safetensors(self.file(batch))
            with safe_open(self.file(batch), framework="pt") as part:
                return "index" in part.keys()  # noqa: SIM118 (it is no dictionary)
        except (OSError, SafetensorError, ValueError):
            return False

    def write(self, drawn: Drawn, images: bool) -> None:
        """Store a batch: codes and features, and the images if asked."""
        assert drawn.features is not None
        tensors = {"index": drawn.index, "codes": drawn.codes.to(torch.int32)}
        tensors |= {name: rows.float() for name, rows in vars(drawn.features).items() if rows is not None}
        if images:
            tensors["images"] = drawn.images
        with replacing(self.file(drawn.batch)) as part:
            save_checked(tensors, part)

    def read(self, batch: int) -> dict[str, Tensor]:
        """index (b,), codes (b, H, W) int32, pool (b, D), and where stored spatial (b, S), logits (b, C), images."""
        return read_tensors(self.file(batch))

    def features(self, batches: int, device: torch.device) -> Features:
        """Features of all samples in order, whoever drew them."""
        parts = [self.read(batch) for batch in range(batches)]
        names = [name for name in ("pool", "spatial", "logits") if name in parts[0]]
        return Features(**{name: torch.cat([part[name] for part in parts]).to(device) for name in names})

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and drop the parts: the evaluation is finished."""
        write_json(self.path / RESULT, result)
        shutil.rmtree(self.parts)
        if self._lock is not None:
            self._lock.close()
        for name in (SETTINGS, LOCK):
            (self.path / name).unlink(missing_ok=True)
