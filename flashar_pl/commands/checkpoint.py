"""`flashar checkpoint verify`: whether checkpoints are what was written."""

from __future__ import annotations

from pathlib import Path


def checkpoint_verify(*paths: str) -> None:
    """Compare checkpoints with the checksums that they carry.

    A Lightning file or another torch file and a model written by `flashar convert` have a CRC-32 of every tensor, a
    sharded checkpoint has a list, digests.json, of its files. Commands that read a checkpoint compare it too, once,
    unless --no-verify is given. Ends with an error that names the damaged file, and the newest whole one beside it.

    Example:
        flashar checkpoint verify runs/mine/checkpoints/last.ckpt

    Args:
        paths: checkpoint files, or directories of converted, sharded or official checkpoints.
    """
    from flashar_pl.checkpoints.verify import offering, verify

    if not paths:
        raise ValueError("name at least one checkpoint, such as runs/mine/checkpoints/last.ckpt.")
    for path in paths:
        with offering(Path(path)):
            print(f"{path}: whole; {verify(Path(path))}.")
