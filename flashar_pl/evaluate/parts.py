"""The samples of an evaluation on disk: one part file per batch, so that a killed run continues where it was.

A part appears under its name complete or not at all, and its contents do not depend on which process wrote it.

Shapes: b samples of a batch, H x W grid, D pooled features, S spatial features, C classes, h x w pixels.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flashar_pl.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.decoding.samples import Drawn

SETTINGS, PARTS, RESULT, LOCK = "settings.json", "parts", "evaluation.json", ".lock"


class PartFolder:
    """The directory of one evaluation.

    Holds `settings.json` (what the samples depend on) and `parts/` while samples are drawn, `evaluation.json` when
    it is finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def parts(self) -> Path:
        """Where the part files are."""
        return self.path / PARTS

    def check(self, identity: dict[str, Any] | None = None) -> None:
        """ValueError unless the directory is new, or an unfinished evaluation of samples with this identity.

        identity None = not known yet: only what the directory itself tells is checked.
        """
        if not self.path.exists():
            return
        if (self.path / RESULT).exists():
            raise ValueError(f"{self.path} holds a finished evaluation; choose another --out or remove it.")
        if not (self.path / SETTINGS).exists():
            raise ValueError(f"{self.path} exists and is no evaluation; choose another --out or remove it.")
        if identity is None:
            return
        stored = json.loads((self.path / SETTINGS).read_text())
        for key, value in json.loads(json.dumps(identity)).items():
            if stored.get(key) != value:
                raise ValueError(
                    f"{self.path} holds samples drawn with {key} {stored.get(key)!r}, this run has {value!r}; give the "
                    "old settings to continue, choose another --out, or remove it."
                )

    def open(self, identity: dict[str, Any]) -> None:
        """Make the directory or continue in it, and hold it: a second run in it is refused until this one ends."""
        self.check(identity)
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")  # held, not only opened: closing it lets go of the lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is drawing samples into {self.path}.") from error
        if not (self.path / SETTINGS).exists():
            write_json(self.path / SETTINGS, identity)

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def file(self, batch: int) -> Path:
        """Where the part of a batch is stored."""
        return self.parts / f"{batch:06d}.safetensors"

    def count(self) -> int:
        """Number of parts."""
        return sum(name.endswith(".safetensors") and not name.startswith(".") for name in os.listdir(self.parts))

    def missing(self, batches: int) -> list[int]:
        """Batches without a readable part."""
        return [batch for batch in range(batches) if not self._readable(batch)]

    def _readable(self, batch: int) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file(batch), framework="pt") as part:
                return "index" in part.keys()  # noqa: SIM118 (it is no dictionary)
        except (OSError, SafetensorError):  # not there, or cut off by a crash of the machine
            return False

    def write(self, drawn: Drawn, images: bool) -> None:
        """Store a batch: codes and features, and the images if asked."""
        import torch
        from safetensors.torch import save_file

        assert drawn.features is not None
        features = drawn.features
        tensors = {"index": drawn.index, "codes": drawn.codes.to(torch.int32), "pool": features.pool.float()}
        optional = {"spatial": features.spatial, "logits": features.logits}
        tensors |= {name: rows.float() for name, rows in optional.items() if rows is not None}
        if images:
            tensors["images"] = drawn.images
        target = self.file(drawn.batch)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, target)

    def read(self, batch: int) -> dict[str, Tensor]:
        """index (b,), codes (b, H, W) int32, pool (b, D), and where stored spatial (b, S), logits (b, C), images."""
        from safetensors.torch import load_file

        return load_file(self.file(batch))

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and drop the parts: the evaluation is finished."""
        write_json(self.path / RESULT, result)
        shutil.rmtree(self.parts)
        self.close()
        for name in (SETTINGS, LOCK):
            (self.path / name).unlink(missing_ok=True)
