"""Safetensors files and directories of them with an index, read row by row and written in shards.

Files are read with plain reads, not memory maps: mapped pages would count as used memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashar_pl.files import write_json
from flashar_pl.renames import TensorSource, unwrapped
from flashar_pl.tensor_files import save_checked
from flashar_pl.text_files import need_file, parse_json, read_json

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
            weight_map = _files_by_key(directory)
            files = sorted(set(weight_map.values()))
        elif (directory / SINGLE).exists():
            weight_map, files = None, [SINGLE]
        else:
            raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}; expected a checkpoint directory.")
        self.stored: dict[str, _Stored] = {}
        for file in files:
            for key, entry in read_header(directory / file).items():
                if weight_map is None or weight_map.get(key) == file:
                    self.stored[unwrapped(key)] = entry
        absent = sorted(unwrapped(key) for key in weight_map or {} if unwrapped(key) not in self.stored)
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
        return self._read(key, begin * math.prod(at.shape[1:]), (end - begin, *at.shape[1:]))

    def whole(self, key: str) -> Tensor:
        """A tensor of any shape."""
        return self._read(key, 0, self.stored[key].shape)

    def _read(self, key: str, begin: int, shape: tuple[int, ...]) -> Tensor:
        """Values of a tensor from the one at `begin` on."""
        at = self.stored[key]
        raw = torch.empty(math.prod(shape) * at.dtype.itemsize, dtype=torch.uint8)
        with at.file.open("rb") as file:
            file.seek(at.begin + begin * at.dtype.itemsize)
            if file.readinto(raw.numpy().data) != len(raw):
                raise ValueError(f"{at.file} ends inside {key}; the download is incomplete.")
        return raw.view(at.dtype).view(shape)


def weight_files(directory: Path) -> list[Path]:
    """The file of a directory's weights, or its shards. ValueError for an index that names files that are not there."""
    shards = _files_by_key(directory).values() if (directory / INDEX).exists() else [SINGLE]
    return [directory / name for name in sorted(set(shards))]


def _files_by_key(directory: Path) -> dict[str, str]:
    """Name of every tensor -> its file, from the index. ValueError for other than files that are there."""
    stored = read_json(directory / INDEX).get("weight_map")
    if not isinstance(stored, dict) or not all(isinstance(file, str) for file in stored.values()):
        raise ValueError(f'{directory / INDEX} holds no "weight_map"; expected the file of every tensor.')
    present = {each.name for each in directory.iterdir() if each.is_file()}
    if absent := sorted(set(stored.values()) - present):
        found = f"{directory / INDEX}: no file {absent[0][:200]}; expected files of this directory"
        raise ValueError(f"{found}. If it should be there, the download is incomplete.")
    return stored


def read_header(path: Path) -> dict[str, _Stored]:
    """Name -> place of every tensor of a safetensors file."""
    if not path.exists():
        raise ValueError(f"no file {path}; the download is incomplete.")
    size = need_file(path).stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a safetensors file, or is cut off.")
        text = file.read(length)
    entries = {}
    try:
        for key, value in parse_json(text.decode(), "its header").items():
            if key == "__metadata__":
                continue
            if value["dtype"] not in DTYPES:
                raise ValueError(f"{key} has dtype {value['dtype']}; expected one of {', '.join(DTYPES)}")
            shape, dtype, (begin, end) = tuple(value["shape"]), DTYPES[value["dtype"]], value["data_offsets"]
            if 8 + length + end > size or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"it ends before {key} does; the download is incomplete")
            entries[key] = _Stored(path, 8 + length + begin, shape, dtype)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}.") from error
    return entries


def write_shards(
    directory: Path, tensors: dict[str, Tensor], beside: Iterable[Path] = (), shard_bytes: int = 5_000_000_000
) -> None:
    """Write a state dict into a directory that exists; beside: as in `save_checked`.

    More than `shard_bytes` are cut into files of at most that size (single tensors may be larger), with an index.
    """
    shards = _cut(tensors, shard_bytes)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        save_checked({key: tensors[key] for key in shard}, directory / name, beside)
        beside = ()  # once is enough


def _cut(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut where a file would pass `limit` bytes."""
    shards: list[list[str]] = []
    room = 0
    for key, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= tensor.nbytes
    return shards
