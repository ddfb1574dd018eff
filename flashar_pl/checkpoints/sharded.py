"""Sharded checkpoints: directories of tensors in the format of torch.distributed.checkpoint, with a `meta.pt`.

torch writes the index of such a directory (`.metadata`) as a pickle and reads it as one, which runs whatever a foreign
file says. It is read here with a list of the few classes an index needs, and must name tensors only.
"""

from __future__ import annotations

import io
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from flashar_pl.files import exchange, full_disk, naming_full_disk, replacing
from flashar_pl.integrity import Damaged, check_directory, file_digests, listed, write_list
from flashar_pl.ranks import gather
from flashar_pl.tensor_files import INDEX, META, read_tensors
from flashar_pl.text_files import BROKEN, need_file, reason

T = TypeVar("T")
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


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own: the one in C makes a list of any length that a file of nine bytes announces."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Reads a sharded checkpoint without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index. Raises ValueError if it is damaged, or refers to anything but tensors of this directory."""
        file = need_file(Path(self.path) / INDEX)
        try:
            index = _Unpickler(io.BytesIO(file.read_bytes())).load()
            if not isinstance(index, metadata.Metadata):
                raise TypeError(f"it holds a {type(index).__name__}")
            _check_index(index, file.parent)
        except BROKEN as error:
            raise ValueError(
                f"{file} is not the index of a sharded checkpoint that can be read safely: {reason(error)}"
            ) from error
        if listed(file.parent) is not None:
            check_directory(file.parent, [INDEX])
        index.storage_meta = getattr(index, "storage_meta", None) or metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.read_metadata().state_dict_metadata)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read into tensors that exist, each process its own shards. All processes call it, or a single one."""
        directory, together = Path(self.path), torch.distributed.is_initialized()
        check_shards(directory)
        with _one_line(directory):
            dcp.load(tensors, storage_reader=self, no_dist=not together)


def _check_index(index: metadata.Metadata, directory: Path) -> None:
    """ValueError unless an index names tensors only, and bytes of files that are in its directory."""
    wanted = 0
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"an entry {name!r} is no tensor")
        if not isinstance(entry.size, torch.Size) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"an entry {name!r} has no sizes")
        wanted += math.prod(entry.size)  # at least a byte each: moments of 8 bits say that they are float32
    sizes = {each.name: each.stat().st_size for each in directory.iterdir() if each.is_file()}
    for place in index.storage_data.values():
        file, begin, length = place.relative_path, place.offset, place.length
        if file not in sizes:
            raise ValueError(f"it names {str(file)[:80]!r}, which is no file of this directory")
        if not 0 <= begin <= begin + length <= sizes[file]:
            raise ValueError(f"{file} has {sizes[file]:,} bytes, fewer than it says")
    if wanted > sum(sizes.values()):
        raise ValueError(f"its tensors have {wanted:,} numbers, more than all files have bytes")


@contextmanager
def _one_line(directory: Path) -> Iterator[None]:
    """torch's errors of one rank or several, which are tables of tracebacks, as one line that names the directory."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        rank, (found, _) = next(iter(error.failures.items()))
        raise ValueError(f"{directory} cannot be read (process {rank}): {reason(found)}.") from error
    except BROKEN as error:
        raise ValueError(f"{directory} cannot be read: {reason(error)}.") from error


def check_shards(directory: Path, again: bool = False) -> bool:
    """Compare all files with their digests, each process its share; whether there are any. All processes call it.

    Raises Damaged in all of them, naming the first damaged file. again: also what has been compared before.
    """
    rank, world = _process()
    problem, found = None, False
    try:
        names = sorted(listed(directory) or ())
        found = check_directory(directory, names[rank::world], again)
    except ValueError as error:
        problem = str(error)
    if problem := next(filter(None, gather(problem)), None):
        raise Damaged(problem)
    return found


def _process() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def read_meta(path: str | Path) -> dict[str, Any]:
    """Everything but tensors of a sharded checkpoint."""
    return read_tensors(Path(path) / META)


def read_sharded(path: str | Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU, of a sharded checkpoint. names: what to call a tensor -> its name there."""
    reader = SafeReader(path)
    check_directory(Path(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name in names.values():
        entry = entries[name]
        assert isinstance(entry, metadata.TensorStorageMetadata)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings(), _one_line(Path(path)):
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process.*")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensors[other] for name, other in names.items()}


def write_sharded(
    path: Path,
    tensors: dict[str, Tensor],
    rest: dict[str, Any],
    first: bool,
    group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint, every process its shards, under a temporary name, which then changes places with the old one.

    So there is a whole checkpoint at `path` at any time, and the old one goes when the new one is there.

    rest: everything but tensors. first: whether this is the first process. group: where all of them meet; None = the
    usual one.

    Raises:
        OSError: in all processes, where one of them found no room; the old checkpoint stays and nothing is left behind.
    """
    part, digests = path.with_name(f".{path.name}.part"), dict[str, Any]()

    def begin() -> None:
        if first:
            _remove(part)
            part.mkdir(parents=True)

    def write() -> dict[str, Any]:
        dcp.save(tensors, checkpoint_id=part, process_group=group)
        own = {each.name: file_digests(each) for each in part.glob(f"__{_process()[0]}_*.distcp")}
        if first:
            with replacing(part / META) as file:
                torch.save(rest, file)
            own |= {name: file_digests(part / name) for name in (META, INDEX)}
        return own

    def end() -> None:
        if first:
            write_list(part, digests)
            exchange(part, path)
            _remove(part)

    try:
        _together(begin, path, group)
        for own in _together(write, path, group):
            digests |= own
        _together(end, path, group)
    except BaseException:
        if first:
            shutil.rmtree(part, ignore_errors=True)  # another error would part this process from the others
        raise


def _together(work: Callable[[], T], path: Path, group: torch.distributed.ProcessGroup | None) -> list[T]:
    """What `work` gives in each process, in all of them. OSError in all of them where it fails in one: a process that
    went on, or waited, would take the others' next meeting for this one."""
    problem, value = None, None
    try:
        with naming_full_disk(path):
            value = work()
    except OSError as error:
        problem = error
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]  # of one process; all have this error, which is no Exception
        if not isinstance(cause, Exception):  # Ctrl-C is no failure to write
            raise cause from None
        problem = full_disk(cause, path) or OSError(f"{path} cannot be written: {reason(cause)}")
    gathered = gather((problem, value), group)
    if problem := next((each for each, _ in gathered if each is not None), None):
        raise problem
    return [cast(T, each) for _, each in gathered]


def _remove(path: Path) -> None:
    """Delete a directory or a file, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
