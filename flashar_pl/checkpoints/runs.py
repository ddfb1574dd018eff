"""Lightning checkpoints of training runs: one file, or a directory of shards. Read without running code from them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.verify import offering
from flashar_pl.integrity import check_torch_file, tensor_crcs
from flashar_pl.tensor_files import META, copied, is_sharded, known_sums, read_tensors

CHECKPOINT_KEY = "flashar"
"""Key of the description inside a Lightning checkpoint."""
NET_PREFIX, EMA_PREFIX = "net.", "ema."
"""Name prefixes of raw and averaged weights inside a Lightning checkpoint."""


def nearest(directory: Path) -> str:
    """The end of a message that `directory` is no checkpoint: which one there may be meant, if any."""
    inside = sorted(file for pattern in ("*.ckpt", "*.pt", "checkpoints/*.ckpt") for file in directory.glob(pattern))
    return f" Did you mean {inside[-1]}?" if inside else ""


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


class RunCheckpoint:
    """A checkpoint that a training run wrote. Its weights are read, and compared, when they are asked for.

    Raises:
        ValueError: nothing there, damaged, holding more than tensors and plain values, or another program's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sharded = is_sharded(path)
        file = self.path / META if self.path.is_dir() else self.path
        if not file.is_file():
            raise ValueError(f"{path} is no Lightning checkpoint: no file {file}.{nearest(self.path)}")
        with offering(self.path):
            self._crcs = None if self.sharded else tensor_crcs(file)
            self.content = read_tensors(file, mmap=True, whole=self.sharded)
        """Everything, or of a sharded checkpoint everything but tensors."""
        if CHECKPOINT_KEY not in self.content:
            raise ValueError(
                f"{path} was not written by `flashar fit`. To start from its weights: --model.init_from {path}"
            )
        state = self.content.get("state_dict", {})
        if not isinstance(state, dict) or not all(map(_is_weight, state.items())):
            raise ValueError(f'{path} is damaged: its "state_dict" holds other things than tensors by name.')
        self.description = Description.from_dict(self.content[CHECKPOINT_KEY])

    def check_whole(self) -> RunCheckpoint:
        """Compare all of a file with its CRC-32s, since another program will read it; of shards each process its own.

        Raises:
            Damaged: naming what is, and the newest whole checkpoint beside it.
        """
        if not self.sharded:
            with offering(self.path):
                check_torch_file(self.path)
        return self

    def names(self) -> list[str]:
        """Names of the weights, raw and averaged."""
        if self.sharded:
            from flashar_pl.checkpoints.sharded import SafeReader  # torch.distributed.checkpoint takes seconds

        names = SafeReader(self.path).names() if self.sharded else self.content.get("state_dict", {})
        return [name for name in names if name.startswith((NET_PREFIX, EMA_PREFIX))]

    def tensors(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Weights by new names, on the CPU in memory of their own. names: what to call one -> its name here."""
        with offering(self.path):
            if self.sharded:
                from flashar_pl.checkpoints.sharded import read_sharded

                return read_sharded(self.path, names)
            stored = self.content.get("state_dict", {})
            wanted = {name: stored[other] for name, other in names.items()}
            return copied(self.path, wanted, self._crcs, known_sums(self.content))
