"""Which batch sizes fit: decided by the planner's arithmetic, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from flashar_pl import devices
from flashar_pl.backbones import Prompts
from flashar_pl.checkpoints.opening import Source
from flashar_pl.console import gib
from flashar_pl.decoding.request import DrawRequest
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes

CAP = {"cpu": 64, "cuda": 1024}
"""Largest batch that `auto` picks."""
BATCH_SIZE = 16
"""Unless fewer fit."""
HEADROOM = 0.9
"""Share of the available memory that decoding may use."""


@dataclass(frozen=True)
class Room:
    """Decoding jobs of one model, whose batch size is to be chosen, and the device they run on."""

    jobs: tuple[DecodeJob, ...]
    """All of them must fit, one at a time."""
    device: torch.device
    weight_copies: int = 1
    """Copies of the weights that are still to be made; 0 = the model is loaded."""

    def choose(self, batch: int | Literal["auto"], most: int = 2**16) -> int:
        """A batch size: "auto", the largest that fits, up to `CAP` and `most`; or a number, if it fits.

        Raises:
            ValueError: a batch that does not fit; the largest that does is named.
        """
        available = self._available()
        if isinstance(batch, str):
            cap = min(CAP.get(self.device.type, CAP["cuda"]), most)
            best = self.largest(cap)
            print(f"auto: batch {best} (largest that fits into {gib(available)}, at most {cap})")
            return self.choose(max(best, 1))
        for job in self.jobs:
            need = replace(job, batch=batch).memory.total + self._other_copies()
            if need > available:
                best = self.largest(2**16)
                advice = f"the largest that fits is {best}" if best else "not even one image fits; use a smaller dtype"
                raise ValueError(
                    f"batch {batch} with the {job.plan} plan needs {gib(need)} and {gib(available)} are available; "
                    f"{advice}."
                )
        return batch

    def choose_all(self, text: str) -> list[int]:
        """Batch sizes from "1,8,auto", each once. Raises ValueError as `choose` does."""
        words = [word.strip() for word in text.split(",")]
        if not all(word == "auto" or (word.isdecimal() and int(word) > 0) for word in words):
            raise ValueError(f"batch_sizes is {text!r}; expected whole numbers or auto, separated by commas.")
        return list(dict.fromkeys(self.choose("auto" if word == "auto" else int(word)) for word in words))

    def largest(self, cap: int) -> int:
        """Largest batch up to `cap` that fits with every plan; 0 if not even one image does."""
        budget = self._available() - self._other_copies()
        return min(job.largest_batch(budget, cap) for job in self.jobs)

    def _available(self) -> int:
        return int(HEADROOM * devices.available_memory(self.device))

    def _other_copies(self) -> int:
        """Bytes of weights to be allocated beside, or less than, the one copy that the planner counts."""
        return (self.weight_copies - 1) * self.jobs[0].model_bytes


def fitting_batch(
    source: Source, request: DrawRequest, batch_size: int | Literal["auto"] | None, bucket: int, devices: int = 1
) -> int:
    """The number of samples to decode together; prompts are padded to a multiple of `bucket`.
    devices: that share the model.

    Raises ValueError for a number that does not fit.
    """
    wanted, model, most, longest = request.wanted, source.model, BATCH_SIZE, None
    prompts = [part for part in (wanted.condition, wanted.unconditional) if isinstance(part, Prompts)]
    if prompts:
        most = min(most, len(wanted))
        longest = -(-max(len(ids) for part in prompts for ids in part) // bucket) * bucket
    dtype, guided = next(model.parameters()).dtype, model.backbone.guided(request.sampling)
    job = DecodeJob(model_sizes(model.config()), request.plan, request.grid, 1, guided, dtype, longest, devices=devices)
    room = Room((job,), model.device, weight_copies=0)
    return room.choose(max(1, room.largest(most)) if batch_size is None else batch_size, most=len(wanted))
