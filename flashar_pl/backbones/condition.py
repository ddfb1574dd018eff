"""What images are generated from: class ids, features of captions, or whole prompts; its embedded form; a batch.

Shapes: B samples, R rows of a forward, P prefix length, D width, T text positions, C feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from flashar_pl.numerics import moved

Kind = Literal["class", "text", "prompt"]


@dataclass(frozen=True)
class Conditioning:
    """What a backbone is conditioned on."""

    kind: Kind
    """Class ids, text features, or token ids of whole prompts."""
    size: int
    """Class: number of classes, whose id is the null class. Text: width C of the features. Prompt: number of tokens."""
    positions: int = 1
    """Prefix positions: 1 for a class, the most that captions have, or those of a usual prompt."""
    first_visual: int | None = None
    """Prompt: token id of code 0, in which the prompt's tokenizer must agree."""
    previews: bool = False
    """Prompt: whether codes of a smaller image follow it."""
    last_from: int | None = None
    """Prompt: smallest token id that it may end with; None = any."""

    def example(self, n: int) -> Condition:
        """A condition of n samples, for measurements: one class after the other, random features or tokens."""
        if self.kind == "class":
            return ClassIds(torch.arange(n) % self.size)
        if self.kind == "text":
            return TextFeatures(torch.randn(n, self.positions, self.size))
        ids = torch.randint(0, min(1000, self.size), (n, self.positions))
        if self.last_from is not None:
            ids[:, -1] = self.last_from
        return Prompts(ids)


class Condition(ABC):
    """What B samples are generated from. All kinds are counted, moved, cut, joined and filled up alike."""

    words: ClassVar[str]
    """How a message says what a model of this kind takes."""

    @abstractmethod
    def __len__(self) -> int:
        """B."""

    @abstractmethod
    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The condition with every tensor changed."""

    def to(self, device: torch.device | str) -> Self:
        """The same condition on `device`."""
        return self.each(lambda tensor: moved(tensor, device))

    def rows(self, index: slice | Sequence[int]) -> Self:
        """The samples `index`, in that order."""
        return self.each(lambda tensor: tensor[index])  # type: ignore[index]

    @abstractmethod
    def check(self, takes: Conditioning) -> None:
        """ValueError where a value is outside what a backbone takes. Of values on a GPU none is looked at."""

    @abstractmethod
    def joined(self, others: list[Any]) -> Self:
        """Its samples, then those of `others`, which are of its kind."""

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """The samples of all parts. ValueError where they are of several kinds or sizes."""
        first, *others = parts
        if strange := [part for part in others if type(part) is not type(first)]:
            raise ValueError(
                f"conditions are {type(first).__name__} and {type(strange[0]).__name__}; expected the same kind."
            )
        return first.joined(others)

    def pad(self, n: int) -> Self:
        """Its samples, filled up to n by the last one."""
        return self.rows([min(i, len(self) - 1) for i in range(n)])


@dataclass(frozen=True, eq=False)
class ClassIds(Condition):
    """Class ids; the number of classes is the id of the null class. Torch takes it for the tensor it holds."""

    ids: Tensor
    """(B,) int64."""
    words: ClassVar[str] = "is class-conditional; expected class ids (B,) int64"

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.is_floating_point():
            raise ValueError(f"expected class ids (B,) int64, got {kind_of(self.ids)}.")

    def __len__(self) -> int:
        return len(self.ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> ClassIds:
        return ClassIds(change(self.ids))

    def joined(self, others: list[Any]) -> ClassIds:
        return ClassIds(torch.cat([self.ids, *(part.ids for part in others)]))

    def check(self, takes: Conditioning) -> None:
        if self.ids.device.type == "cpu" and self.ids.numel():
            low, high = int(self.ids.min()), int(self.ids.max())
            if low < 0 or high > takes.size:
                raise ValueError(
                    f"class ids range from {low} to {high}; expected 0 to {takes.size - 1} "
                    f"({takes.size} = unconditional)."
                )

    # Batches held a plain tensor once; what reads classes from them as one goes on working.

    def __getitem__(self, index: Any) -> Tensor:
        return self.ids[index]

    def __getattr__(self, name: str) -> Any:
        if name == "ids" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.ids, name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(_bare(each) for each in args), **(kwargs or {}))


def _bare(value: Any) -> Any:
    """Class ids, also those in a list, as the tensors they hold."""
    if isinstance(value, list | tuple):
        return type(value)(_bare(each) for each in value)
    return value.ids if isinstance(value, ClassIds) else value


@dataclass(frozen=True, eq=False)
class TextFeatures(Condition):
    """Features of a text encoder, left-padded: valid positions stand at the end."""

    features: Tensor
    """(B, T, C) floating point."""
    mask: Tensor | None = None
    """(B, T) bool or 0/1, True = valid; None = every position is valid."""
    words: ClassVar[str] = "is text-conditional; expected TextFeatures"

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(f"TextFeatures.features has shape {tuple(self.features.shape)}; expected (B, T, C).")
        if self.mask is not None and self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                f"TextFeatures.mask has shape {tuple(self.mask.shape)}; expected {tuple(self.features.shape[:2])}."
            )

    def __len__(self) -> int:
        return self.features.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> TextFeatures:
        return TextFeatures(change(self.features), None if self.mask is None else change(self.mask))

    def joined(self, others: list[Any]) -> TextFeatures:
        for other in others:
            (n, width), (m, other_width) = self.features.shape[1:], other.features.shape[1:]
            if (n, width) != (m, other_width):
                raise ValueError(
                    f"text features have {n} positions of width {width}, others {m} of {other_width}; "
                    "expected the same for condition and unconditional."
                )
            if (self.mask is None) != (other.mask is None):
                raise ValueError("of condition and unconditional only one has a mask; expected both or none.")
        mask = None if self.mask is None else torch.cat([self.mask, *(other.mask for other in others)])
        return TextFeatures(torch.cat([self.features, *(other.features for other in others)]), mask)

    def check(self, takes: Conditioning) -> None:
        _, positions, width = self.features.shape
        if width != takes.size or positions > takes.positions:
            raise ValueError(
                f"text features have {positions} positions of width {width}; expected at most {takes.positions} of "
                f"width {takes.size}."
            )
        mask = self.mask
        if mask is not None and mask.device.type == "cpu" and bool((mask.bool().int().diff(dim=1) < 0).any()):
            raise ValueError("a text mask has padding after valid positions; expected left-padded features.")


class Prompts(list[Tensor], Condition):
    """One 1-D tensor of token ids for each sample, the whole prefix of its image, of any lengths."""

    words = "takes prompts; expected a list of 1-D id tensors"

    def each(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        return Prompts(change(ids) for ids in self)

    def rows(self, index: slice | Sequence[int]) -> Prompts:
        return Prompts(self[index] if isinstance(index, slice) else [self[i] for i in index])

    def joined(self, others: list[Any]) -> Prompts:
        return Prompts(ids for part in (self, *others) for ids in part)

    def check(self, takes: Conditioning) -> None:
        if not self:
            raise ValueError("expected a list of 1-D id tensors, got an empty list.")
        for ids in self:
            if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or not len(ids):
                raise ValueError(f"a prefix is {kind_of(ids)}; expected a 1-D tensor of token ids, not empty.")
            if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < takes.size:
                raise ValueError(
                    f"prefix ids range from {int(ids.min())} to {int(ids.max())}; expected 0 to {takes.size - 1}."
                )


KINDS: dict[Kind, type[Condition]] = {"class": ClassIds, "text": TextFeatures, "prompt": Prompts}
Given = Condition | Tensor | list[Tensor]
"""What callers may give: a condition, or bare class ids (B,) int64, or a bare list of prompts."""


def as_condition(given: Given) -> Condition:
    """What a caller gave, as a condition. ValueError for anything else."""
    if isinstance(given, Condition):
        return given
    if isinstance(given, Tensor):
        return ClassIds(given)
    if isinstance(given, list):
        return Prompts(given)
    raise ValueError(f"condition is {kind_of(given)}; expected class ids (B,), TextFeatures, or a list of id tensors.")


def kind_of(value: object) -> str:
    """A value in the words of a message."""
    if isinstance(value, ClassIds):
        value = value.ids
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "TextFeatures" if isinstance(value, TextFeatures) else f"a {type(value).__name__}"


@dataclass
class Batch:
    """What a DataModule yields."""

    codes: Tensor
    """(B, H, W) int64, 0-based code ids."""
    condition: Condition
    """Of B samples; the constructor takes bare class ids or a bare list of prompts, too."""
    valid: Tensor | None = None
    """(B,) bool, False for rows that only fill up a last batch; None = all valid."""
    index: Tensor | None = None
    """(B,) int64 sample ids within the split; None = unknown."""
    previews: Tensor | None = None
    """(B, h, w) int64 codes of a smaller version of each image, which follow its prompt; None = there are none."""

    def __post_init__(self) -> None:
        self.condition = as_condition(self.condition)

    def __len__(self) -> int:
        return self.codes.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        others = (None if part is None else moved(part, device) for part in (self.valid, self.index, self.previews))
        return Batch(moved(self.codes, device), self.condition.to(device), *others)


@dataclass(frozen=True)
class Prefix:
    """The embedded condition."""

    x: Tensor
    """(R, P, D)."""
    lengths: Tensor
    """(R,) int64, valid positions of each row; they stand at the end."""
    mask: Tensor | None = None
    """(R, P) bool, True = valid; None = every position is valid."""
    previews: tuple[int, ...] | None = None
    """Positions at the end of each row that are codes of a smaller image; None = there are none."""
    image: Tensor | None = None
    """(R, n) bool, which of the last n positions are tokens of images, where that matters; None = none are."""

    def __len__(self) -> int:
        return self.x.shape[1]
