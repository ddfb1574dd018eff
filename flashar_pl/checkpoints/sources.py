"""Tensors by name, read row by row: a state dict, a safetensors file, or a directory of them with an index.

A rank of a sharded model asks for its own rows only, so that a checkpoint larger than the memory of one machine can
be loaded (`fill`). Files are read with plain reads, not memory maps: mapped pages would count as used memory.

Shapes: n rows of a tensor, the first axis.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header."""


class TensorSource(ABC):
    """Named tensors that can be read in slices of rows."""

    name: str
    """For messages."""

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """Every name."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""

    @abstractmethod
    def rows(self, key: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a tensor, on the CPU or where the state dict has it."""


class StateDict(TensorSource):
    """A state dict in memory. Names lose the prefixes that wrappers leave behind."""

    name = "the state dict"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {_unwrapped(key): value.detach() for key, value in tensors.items()}

    def keys(self) -> Iterable[str]:
        return self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        return self.tensors[key][begin:end]


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    begin: int
    """Byte of its first element in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsDirectory(TensorSource):
    """A directory with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Only headers are read on construction. ValueError if a file is missing or is not a safetensors file.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.name = str(directory)
        if (directory / INDEX).exists():
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (directory / SINGLE).exists():
            weight_map, files = None, [SINGLE]
        else:
            raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}; expected a checkpoint directory.")
        self.stored: dict[str, _Stored] = {}
        for file in files:
            for key, entry in _read_header(directory / file).items():
                if weight_map is None or weight_map.get(key) == file:
                    self.stored[_unwrapped(key)] = entry
        absent = sorted(_unwrapped(key) for key in weight_map or {} if _unwrapped(key) not in self.stored)
        if absent:
            raise ValueError(f"{directory / INDEX} lists {', '.join(absent[:4])}, which the named shard does not hold.")

    def keys(self) -> Iterable[str]:
        return self.stored

    def shape(self, key: str) -> tuple[int, ...]:
        return self.stored[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self.stored[key].dtype

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        at = self.stored[key]
        row_bytes = math.prod(at.shape[1:]) * at.dtype.itemsize
        raw = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
        with at.file.open("rb") as file:
            file.seek(at.begin + begin * row_bytes)
            if file.readinto(raw.numpy().data) != len(raw):
                raise ValueError(f"{at.file} ends inside {key}; the download is incomplete.")
        return raw.view(at.dtype).view(end - begin, *at.shape[1:])


def _read_header(path: Path) -> dict[str, _Stored]:
    """Name -> place of every tensor of a safetensors file."""
    if not path.exists():
        raise ValueError(f"no file {path}; the download is incomplete.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a safetensors file, or is cut off.")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for key, value in header.items():
        if value["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} has dtype {value['dtype']}; expected one of {', '.join(DTYPES)}.")
        begin, end = value["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"{path} ends before {key} does; the download is incomplete.")
        entries[key] = _Stored(path, 8 + length + begin, tuple(value["shape"]), DTYPES[value["dtype"]])
    return entries


def _unwrapped(key: str) -> str:
    while key.startswith(("module.", "_orig_mod.")):
        key = key.split(".", 1)[1]
    return key


@dataclass(frozen=True)
class Rename:
    """One of our tensors and the official ones whose rows it holds, in order."""

    ours: str
    pieces: tuple[tuple[str, int], ...]
    """Official name and number of rows taken from it."""
    skip: int = 0
    """Rows of each official tensor that come before those taken."""


def check_names(source: TensorSource, renames: list[Rename], ignored: Iterable[str] = ()) -> None:
    """ValueError unless `source` has exactly the names of `renames`, apart from those in `ignored`."""
    wanted = {key for rename in renames for key, _ in rename.pieces}
    found = set(source.keys())
    missing, unknown = sorted(wanted - found), sorted(found - wanted - set(ignored))
    if missing or unknown:
        raise ValueError(
            f"{source.name} is not the expected checkpoint: {_some('missing keys', missing)}; "
            f"{_some('unknown keys', unknown)}."
        )


@torch.no_grad()
def fill(module: nn.Module, source: TensorSource, renames: list[Rename], device: torch.device | str = "cpu") -> None:
    """Copy `source` into the parameters that `renames` names, piece by piece, converting to their dtype.

    A module on the meta device gets memory on `device` first. Parameters that FSDP2 has sharded read only the rows
    of this rank. Parameters that `renames` does not name keep their values, and must not be on the meta device.

    Raises:
        ValueError: a tensor of `source` has another shape than the parameter needs.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)
    parameters = dict(module.named_parameters())
    for rename in renames:
        parameter = parameters[rename.ours]
        local, offset = _own_rows(parameter)
        place = 0  # row of the whole parameter at which the next piece starts
        for key, n in rename.pieces:
            expected = (n + rename.skip, *parameter.shape[1:])
            if source.shape(key) != expected:
                raise ValueError(f"{key} has shape {source.shape(key)}; this model expects {expected}.")
            begin, end = max(offset, place), min(offset + len(local), place + n)
            if begin < end:
                rows = source.rows(key, rename.skip + begin - place, rename.skip + end - place)
                local[begin - offset : end - offset].copy_(rows)
            place += n
        assert place == parameter.shape[0], f"{rename.ours} has {parameter.shape[0]} rows, the table names {place}"


def _own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows that this rank holds, and the index of the first one."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    local = parameter.to_local()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if tuple(shape[1:]) != tuple(parameter.shape[1:]):
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is cut along another axis than its rows.")
    return local, offset[0]


def source_dtype(source: TensorSource, key: str) -> torch.dtype:
    """Dtype in which a model read from `source` is kept: that of tensor `key`."""
    if key not in set(source.keys()):
        raise ValueError(f"{source.name} is not the expected checkpoint: {key} is missing.")
    return source.dtype(key)


def split_rows(tensors: dict[str, Tensor], renames: list[Rename]) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `fill` where no rows were skipped."""
    official = {}
    for rename in renames:
        parts = tensors[rename.ours].detach().split([n for _, n in rename.pieces])
        for (key, _), part in zip(rename.pieces, parts, strict=True):
            official[key] = part.clone()
    return official


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return f"no {what}"
    return f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
