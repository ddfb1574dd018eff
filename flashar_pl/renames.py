"""Weights under other names: one table reads an official checkpoint into a module, row by row, and writes it back.

A rank of a sharded model asks for its own rows only, so that a checkpoint larger than the memory of one machine can
be read (`fill`).

Shapes: n rows of a tensor, the first axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashar_pl.numerics import is_cut, without_memory
from flashar_pl.options import Weights
from flashar_pl.tensor_files import drop_pages
from flashar_pl.text_files import BROKEN, reason

WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What DDP, torch.compile, activation checkpointing and FSDP leave behind in names, wherever they wrapped a part."""
CONTAINERS = ("model", "module", "state_dict")
"""Under which of these names a file has its state dict, the first that is there."""
AVERAGED = "ema"
"""Name of the state dict of averaged weights beside it, or instead of it."""

T = TypeVar("T", bound=nn.Module)


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

    def release(self, key: str) -> None:  # noqa: B027 (most sources hold nothing back)
        """Give back what memory a tensor takes that is read for now."""


class StateDict(TensorSource):
    """A state dict in memory. Names lose what wrappers left behind. ValueError for what is no tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        self.name = name
        self.tensors = {unwrapped(key): value for key, value in tensors.items()}
        if odd := sorted(key for key, value in self.tensors.items() if not torch.is_tensor(value)):
            raise ValueError(f"{name} is not the expected checkpoint: {_some('entries that are no tensors', odd)}.")

    def keys(self) -> Iterable[str]:
        return self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        return self.tensors[key].detach()[begin:end]

    def release(self, key: str) -> None:
        drop_pages(self.tensors[key])


def official_state_dict(content: Mapping[str, Any], weights: Weights = "auto") -> tuple[Mapping[str, Tensor], str]:
    """(state dict inside an official container, or the content itself; "raw" or "ema", which one was chosen).

    weights: auto = the averaged ones where there are any. ValueError where the wanted ones are not there.
    """
    averaged = content.get(AVERAGED)
    if isinstance(averaged, Mapping) and weights != "raw":
        return averaged, "ema"
    if weights == "ema":
        raise ValueError("the file holds no averaged weights; use --weights auto.")
    found = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    if found is None and isinstance(averaged, Mapping):
        raise ValueError("the file holds averaged weights only; use --weights ema.")
    return content if found is None else found, "raw"


def unwrapped(key: str) -> str:
    """A name without what wrappers leave behind."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Rename:
    """One of our tensors and the official ones whose rows it holds, in order."""

    ours: str
    pieces: tuple[str, ...]
    """Official names."""
    sizes: tuple[int, ...] | None = None
    """Number of rows taken from each; None = equal numbers."""
    skip: int = 0
    """Rows of each official tensor that come before those taken."""

    def split(self, n: int) -> list[tuple[str, int]]:
        """(official name, number of rows) of every piece, where ours has n rows."""
        sizes = self.sizes or (n // len(self.pieces),) * len(self.pieces)
        assert sum(sizes) == n, f"{self.ours} has {n} rows, the table names {sum(sizes)}"
        return list(zip(self.pieces, sizes, strict=True))

    def under(self, ours: str, official: str) -> Rename:
        """The same below the given prefixes."""
        return Rename(ours + self.ours, tuple(official + piece for piece in self.pieces), self.sizes, self.skip)


def on_meta(build: Callable[[], T]) -> T:
    """A module without memory for weights. ValueError for a description that none can be built from."""
    try:
        with without_memory():
            return build()
    except BROKEN as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"no model can be built from its description: {reason(error)}.") from error


def build_filled(
    build: Callable[[], T],
    source: TensorSource,
    renames: Sequence[Rename],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignored: Iterable[str] = (),
) -> T:
    """The module of `build` with the weights of `source`, copied to `device`, in evaluation mode. ValueError as `fill`.

    dtype: of all its weights; None = that of the first tensor of the table in the source.
    """
    module = on_meta(build)
    _check(source, renames, _tensors(module), set(ignored := list(ignored)))
    module.to(dtype or source.dtype(renames[0].pieces[0]))
    fill(module, source, renames, device, ignored)
    return module.eval()


@torch.no_grad()
def fill(
    module: nn.Module,
    source: TensorSource,
    renames: Sequence[Rename],
    device: torch.device | str = "cpu",
    ignored: Iterable[str] = (),
) -> None:
    """Copy `source` into the tensors that `renames` names, piece by piece, converting to their dtype.

    A module on the meta device gets memory on `device` first. Parameters that FSDP2 has sharded read only the rows
    of this rank. Tensors that `renames` does not name keep their values, and have none on the meta device.

    Raises:
        ValueError: `source` has other names, apart from those in `ignored`, or a tensor of another shape.
    """
    tensors = _tensors(module)
    _check(source, renames, tensors, set(ignored))
    if any(tensor.is_meta for tensor in tensors.values()):
        tensors = _tensors(module.to_empty(device=device))
    for rename in renames:
        local, offset = _own_rows(tensors[rename.ours])
        place = 0  # row of the whole tensor at which the next piece starts
        for key, n in rename.split(tensors[rename.ours].shape[0]):
            begin, end = max(offset, place), min(offset + len(local), place + n)
            if begin < end:
                rows = source.rows(key, rename.skip + begin - place, rename.skip + end - place)
                local[begin - offset : end - offset].copy_(rows)
                source.release(key)
            place += n


def split_rows(tensors: Mapping[str, Tensor], renames: Iterable[Rename]) -> dict[str, Tensor]:
    """The official state dict from ours, all copies: the inverse of `fill` where the renames name every official row.

    An official tensor whose rows lie in several of ours is put together in the order of their `skip`.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for rename in renames:
        whole = tensors[rename.ours].detach()
        pieces = rename.split(len(whole))
        for (key, _), part in zip(pieces, whole.split([n for _, n in pieces]), strict=True):
            parts.setdefault(key, {})[rename.skip] = part
    return {key: torch.cat([found[skip] for skip in sorted(found)]) for key, found in parts.items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _check(source: TensorSource, renames: Sequence[Rename], tensors: dict[str, Tensor], ignored: set[str]) -> None:
    shapes = {rename: tensors[rename.ours].shape for rename in renames}
    wanted: dict[str, tuple[int, ...]] = {}
    for rename, shape in shapes.items():
        for key, n in rename.split(shape[0]):
            wanted[key] = max(wanted.get(key, ()), (n + rename.skip, *shape[1:]))
    found = set(source.keys())
    real = {key for key in found & wanted.keys() if source.dtype(key).is_floating_point}
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys() - ignored)
    odd = [
        f"{key} has shape {source.shape(key)}{'' if key in real else ' of integers'}; this model expects {shape}"
        for key, shape in wanted.items()
        if key in found and (source.shape(key) != shape or key not in real)
    ]
    if missing or unknown or odd:
        problems = [_some("missing keys", missing), _some("unknown keys", unknown), *odd[:4]]
        raise ValueError(f"{source.name} is not the expected checkpoint: {'; '.join(problems)}.")


def _own_rows(parameter: Any) -> tuple[Tensor, int]:
    """The rows that this rank holds, and the index of the first one."""
    if not is_cut(parameter):
        return parameter, 0
    cut = [(axis, placement) for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
    assert len(cut) <= 1 and all(placement.dim == 0 for _, placement in cut), "a parameter is not cut by its rows"
    n, mesh = parameter.shape[0], parameter.device_mesh
    begin = sum(min(n, -(-n // mesh.size(axis)) * mesh.get_local_rank(axis)) for axis, _ in cut)
    return parameter.to_local(), begin


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return f"no {what}"
    return f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
