"""Sharded checkpoints: directories of tensors in the format of torch.distributed.checkpoint, with a `meta.pt`.

torch writes the index of such a directory (`.metadata`) as a pickle and reads it as one, which runs whatever a foreign
file says. It is read here with a list of the few classes an index needs, and must name tensors only.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from flashar_pl.files import BROKEN, read_tensors, reason

META = "meta.pt"
"""Everything but tensors, plain types."""
INDEX = ".metadata"
ALLOWED = {
    (metadata.__name__, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (filesystem.__name__, "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""What an index may refer to, besides dtypes."""


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is a sharded checkpoint."""
    return (Path(path) / META).is_file() and (Path(path) / INDEX).is_file()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Reads a sharded checkpoint without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index. Raises ValueError if it is damaged, or refers to anything but tensors."""
        file = Path(self.path) / INDEX
        try:
            with file.open("rb") as stream:
                index = _Unpickler(stream).load()
        except BROKEN as error:
            raise ValueError(
                f"{file} is not the index of a sharded checkpoint that can be read safely: {reason(error)}"
            ) from error
        if not isinstance(index, metadata.Metadata):
            raise ValueError(f"{file} is not the index of a sharded checkpoint.")
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(entry, metadata.TensorStorageMetadata):
                raise ValueError(f"{file} has an entry {name!r} that is no tensor.")
        index.storage_meta = getattr(index, "storage_meta", None) or metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.read_metadata().state_dict_metadata)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read into tensors that exist, each process its own shards. All processes call it, or a single one."""
        dcp.load(tensors, storage_reader=self, no_dist=not torch.distributed.is_initialized())


def read_meta(path: str | Path) -> dict[str, Any]:
    """Everything but tensors of a sharded checkpoint."""
    return read_tensors(Path(path) / META)


def read_sharded(path: str | Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU, of a sharded checkpoint. names: what to call a tensor -> its name there."""
    reader = SafeReader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name in names.values():
        entry = entries[name]
        assert isinstance(entry, metadata.TensorStorageMetadata)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process.*")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensors[other] for name, other in names.items()}


def write_sharded(
    path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], first: bool, barrier: Callable[[], object]
) -> None:
    """Write a checkpoint, every process its shards, under a temporary name; the old one goes when the new one is whole.

    rest: everything but tensors. first: whether this is the first process. barrier: waits for all of them.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    if first:
        _remove(part)
        part.mkdir(parents=True)
    barrier()
    dcp.save(tensors, checkpoint_id=part)
    if first:
        torch.save(rest, part / META)
        _remove(old)
        if path.exists():
            path.rename(old)
        part.rename(path)
        _remove(old)
    barrier()


def _remove(path: Path) -> None:
    """Delete a directory or a file, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
