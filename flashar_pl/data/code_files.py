"""Codes that other programs made: LlamaGen's .npy files, and the .pt members of the FlashAR authors' Emu3.5 tars.

Shapes: K crops of an image, H x W grid, N = H * W codes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashar_pl.data.account import Account
from flashar_pl.data.items import Prepared
from flashar_pl.data.manifest import ConditionSpec
from flashar_pl.data.sources import Names, Source, read_file
from flashar_pl.image_files import Unreadable
from flashar_pl.tensor_files import read_arrays, read_torch


class NpyFolders(Source):
    """LlamaGen's layout: CODES/{i}.npy holds the codes of image i, int64 (1, K, N), LABELS/{i}.npy its class id, (1,).

    Raises:
        ValueError: no such files, or the numbers are not 0 .. n - 1 in both folders.
    """

    def __init__(self, codes: str, labels: str, num_classes: int) -> None:
        self.codes, self.labels = Path(codes).expanduser(), Path(labels).expanduser()
        self.account = Account()
        self._n = self.account.used = _numbered(self.codes, self.account)
        if (n := _numbered(self.labels, Account())) != self._n:
            raise ValueError(f"{codes} holds {self._n} files, {labels} holds {n}; expected a label for every image.")
        self.condition = ConditionSpec("class", num_classes=num_classes)

    def __len__(self) -> int:
        return self._n

    def where(self, index: int) -> str:
        return str(self.codes / f"{index}.npy")

    def read(self, index: int) -> tuple[bytes, int]:
        file = self.labels / f"{index}.npy"
        label, classes = _load_npy(read_file(str(file))), self.condition.num_classes
        if label.size != 1 or label.dtype.kind not in "iu":
            raise Unreadable(f"{file} holds {label.size} values of type {label.dtype}; expected one integer")
        value = int(label.reshape(-1)[0])
        if classes is None or not 0 <= value < classes:
            raise Unreadable(f"{file} has the label {value}; expected 0 .. {(classes or 0) - 1} (see --num-classes)")
        return read_file(self.where(index)), value

    def fingerprint(self) -> str:
        return Names([str(self._n)]).digest()

    def layout(self, grid: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        """(K, (H, W)) from the first file; grid None = a square. Raises ValueError unless its codes fill the grid."""
        try:
            array = _load_npy(read_file(self.where(0)))
        except Unreadable as error:
            raise ValueError(f"{self.where(0)}: {error}") from error
        if array.ndim != 3 or array.shape[0] != 1:
            raise ValueError(f"{self.where(0)} has shape {array.shape}; expected (1, crops, codes).")
        side = math.isqrt(array.shape[2])
        height, width = grid or (side, side)
        if height * width != array.shape[2]:
            raise ValueError(
                f"{self.where(0)} holds {array.shape[2]} codes for each crop, not {height} x {width}; add --grid "
                "HEIGHTxWIDTH."
            )
        return array.shape[1], (height, width)


@dataclass(frozen=True)
class NpyCodes:
    """Bytes of a code file -> (K, H, W) int64."""

    crops: int
    grid: tuple[int, int]
    vocabulary: int

    def __call__(self, data: bytes) -> np.ndarray:
        array = _load_npy(data)
        expected = (1, self.crops, self.grid[0] * self.grid[1])
        if array.shape != expected:
            raise Unreadable(f"shape {array.shape}, others have {expected}")
        return checked(array.reshape(self.crops, *self.grid), self.vocabulary)


@dataclass(frozen=True)
class PtCodes:
    """Bytes of a torch file with one int64 tensor (H, W) of codes without offset -> (1, H, W) int64.

    Where the file holds {"codes": (H, W), "preview": (h, w)}, both. Loaded with weights_only=True: no code in it runs.
    """

    vocabulary: int

    def __call__(self, data: bytes) -> Prepared:
        try:
            found = read_torch("the file", data)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        if isinstance(found, dict) and found.keys() == {"codes", "preview"}:
            return self._grid(found["codes"]), self._grid(found["preview"])
        return self._grid(found)

    def _grid(self, tensor: Any) -> np.ndarray:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.is_floating_point():
            found = (
                f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise Unreadable(f"expected an integer tensor (H, W), found {found}")
        return checked(tensor.numpy()[None], self.vocabulary)


def checked(codes: np.ndarray, vocabulary: int) -> np.ndarray:
    """Integer codes as int64. Raises `Unreadable` where one is outside the vocabulary."""
    if codes.dtype.kind not in "iu":
        raise Unreadable(f"codes of type {codes.dtype}")
    if codes.size == 0 or codes.min() < 0 or codes.max() >= vocabulary:
        spread = f"{codes.min()} .. {codes.max()}" if codes.size else "none"
        raise Unreadable(f"codes {spread}; the vocabulary of {vocabulary} allows 0 .. {vocabulary - 1}")
    return codes.astype(np.int64)


def _numbered(folder: Path, account: Account) -> int:
    """How many files 0.npy, 1.npy, ... a folder holds; the others go to the account. Raises ValueError for a gap."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected files 0.npy, 1.npy, ...")
    names = {path.name for path in folder.iterdir()}
    found = {name for name in names if re.fullmatch(r"(0|[1-9][0-9]{0,11})\.npy", name)}
    if not found:
        raise ValueError(f"{folder} holds no files named 0.npy, 1.npy, ...")
    missing = next((f"{i}.npy" for i in range(len(found)) if f"{i}.npy" not in found), None)
    if missing is not None:
        most = max(int(name.removesuffix(".npy")) for name in found)
        raise ValueError(f"{folder} goes up to {most}.npy but lacks {most + 1 - len(found)}, such as {missing}.")
    for name in sorted(names - found):
        account.leave_out("not named NUMBER.npy", name)
    return len(found)


def _load_npy(data: bytes) -> np.ndarray:
    try:
        return read_arrays("it", data)["array"]
    except (ValueError, KeyError) as error:
        raise Unreadable(f"no .npy file ({str(error)[:100]})") from error
