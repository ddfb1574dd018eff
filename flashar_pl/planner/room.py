"""Which batch sizes fit: decided by the planner's arithmetic, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flashar_pl.console import gib

if TYPE_CHECKING:
    import torch

    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding.prompts import Wanted
    from flashar_pl.options import SamplingSettings
    from flashar_pl.planner.sizes import ModelSizes

CAP = {"cpu": 64, "cuda": 1024}
"""Largest batch that `auto` picks."""
BATCH_SIZE = 16
"""Unless fewer fit."""
HEADROOM = 0.9
"""Share of the available memory that decoding may use."""


@dataclass(frozen=True)
class Room:
    """Decoding jobs that differ in their batch size only, and the memory of the device they run on."""

    sizes: ModelSizes
    plans: tuple[str, ...]
    """All of them must fit, one at a time."""
    grid: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    guided: bool
    prefix: int | None = None
    """Prefix positions; None = usual for the model."""
    weight_copies: int = 1
    """Copies of the weights that are still to be made; 0 = the model is loaded."""

    def choose(self, word: str | int, most: int | None = None) -> int:
        """A batch size: "auto", the largest that fits, up to `CAP` and `most`; or a number, if it fits.

        Raises:
            ValueError: neither of them, or a batch that does not fit; the largest that does is named.
        """
        cap = CAP.get(self.device.type, CAP["cuda"])
        if word == "auto":
            cap = cap if most is None else min(cap, most)
            batch = self.largest(cap)
            print(f"auto: batch {batch} (largest that fits into {gib(self._available())}, at most {cap})")
        elif str(word).isdecimal() and int(word) > 0:
            batch = int(word)
        else:
            raise ValueError(f"batch size is {word!r}; expected a whole number or auto.")
        self._check(max(batch, 1))
        return batch

    def choose_all(self, text: str) -> list[int]:
        """Batch sizes from "1,8,auto", each once. Raises ValueError as `choose` does."""
        words = [word.strip() for word in text.split(",")]
        if not all(word == "auto" or (word.isdecimal() and int(word) > 0) for word in words):
            raise ValueError(f"batch_sizes is {text!r}; expected whole numbers or auto, separated by commas.")
        return list(dict.fromkeys(self.choose(word) for word in words))

    def largest(self, cap: int) -> int:
        """Largest batch up to `cap` that fits with every plan; 0 if not even one image does."""
        from flashar_pl.planner import largest_batch

        budget = self._available() - self._other_copies()
        return min(
            largest_batch(self.sizes, plan, self.grid, budget, self.guided, self.dtype, cap, self.prefix)
            for plan in self.plans
        )

    def _check(self, batch: int) -> None:
        from flashar_pl.planner import decode_memory

        available = self._available()
        for plan in self.plans:
            memory = decode_memory(self.sizes, plan, self.grid, batch, self.guided, self.dtype, self.prefix)
            need = memory.total + self._other_copies()
            if need > available:
                best = self.largest(2**16)
                advice = f"the largest that fits is {best}" if best else "not even one image fits; use a smaller dtype"
                raise ValueError(
                    f"batch {batch} with the {plan} plan needs {gib(need)} and {gib(available)} are available; "
                    f"{advice}."
                )

    def _available(self) -> int:
        from flashar_pl import devices

        return int(HEADROOM * devices.available_memory(self.device))

    def _other_copies(self) -> int:
        """Bytes of weights to be allocated beside, or less than, the one copy that the planner counts."""
        from flashar_pl.planner import model_bytes

        return (self.weight_copies - 1) * model_bytes(self.sizes, self.dtype)


def fitting_batch(
    source: Source,
    wanted: Wanted,
    grid: tuple[int, int],
    plan: str,
    settings: SamplingSettings,
    batch_size: int | Literal["auto"] | None,
    bucket: int,
) -> int:
    """The number of samples to decode together; prompts are padded to a multiple of `bucket`.

    Raises ValueError for a number that does not fit.
    """
    from flashar_pl.backbones import Prompts
    from flashar_pl.planner import model_sizes

    model, most, longest = source.model, None, None
    prompts = [part for part in (wanted.condition, wanted.unconditional) if isinstance(part, Prompts)]
    if prompts:
        most = len(wanted)
        longest = -(-max(len(ids) for part in prompts for ids in part) // bucket) * bucket
    room = Room(
        model_sizes(model.config()), (plan,), grid, model.device, next(model.parameters()).dtype, settings.guided,
        prefix=longest, weight_copies=0,
    )  # fmt: skip
    if batch_size is None:
        return room.choose(max(1, room.largest(min(BATCH_SIZE, most or BATCH_SIZE))))
    return room.choose(batch_size, most=len(wanted))
