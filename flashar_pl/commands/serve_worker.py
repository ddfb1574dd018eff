"""Requests for images, drawn together where they can be: one thread owns the engine.

Shapes: n samples of a request, B of a batch, H x W grid, h x w pixels.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.condition import Condition
    from flashar_pl.decoding import Engine
    from flashar_pl.sampling import SamplingSettings
    from flashar_pl.tokenizers import Tokenizer

CLOSED = "no more images are drawn: the server is closing, or has printed an error that ended the drawing."


@dataclass(frozen=True)
class Drawn:
    """The images of one request."""

    images: Tensor
    """(n, 3, h, w) uint8 on the CPU."""
    seconds: float
    """From the start of its batch to the pixels."""
    batch: int
    """Samples that were drawn together, those of other requests included."""


@dataclass(frozen=True)
class Request:
    """Samples that one caller wants."""

    condition: Condition
    """Of n samples."""
    unconditional: Condition | None
    """For guidance; None = the model's own."""
    plan: str
    sampling: SamplingSettings
    seeds: list[int]
    """n of them."""
    result: Future[Drawn] = field(default_factory=Future)

    def joins(self, other: Request) -> bool:
        """Whether both can be drawn in one batch."""
        same = (self.plan, self.sampling, self.unconditional is None)
        return same == (other.plan, other.sampling, other.unconditional is None)


class Worker:
    """Draws requests in the order they come. Those that wait meanwhile share batches if their settings agree.

    A sample depends on its own seed and condition, and on the others of its batch up to rounding.

    Args:
        engine: used by the worker's thread alone.
        tokenizer: on the engine's device.
        grid: (H, W) of every image.
        batch_size: most samples drawn together, and most of one request.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, grid: tuple[int, int], batch_size: int) -> None:
        self.engine, self.tokenizer, self.grid, self.batch_size = engine, tokenizer, grid, batch_size
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._held: list[Request] = []  # taken from the queue, but not for the batch that was drawn then
        self._closed = False
        self._lock = threading.Lock()  # nothing joins the queue once the worker is closed
        self._thread = threading.Thread(target=self._work, name="flashar-worker", daemon=True)
        self._thread.start()

    def draw(self, request: Request) -> Drawn:
        """The images of a request; waits for them.

        Raises:
            ValueError: more samples than a batch holds; what the model refuses; or the worker is closed.
            RuntimeError: what the device refuses, such as memory that ran out.
        """
        if len(request.seeds) > self.batch_size:
            raise ValueError(f"{len(request.seeds)} images are wanted at once; expected at most {self.batch_size}.")
        with self._lock:
            if self._closed:
                raise ValueError(CLOSED)
            self._waiting.put(request)
        return request.result.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Refuse what waits, and end the thread after the batch it is drawing."""
        with self._lock:
            self._closed = True
        self._waiting.put(None)
        self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether no more images are drawn."""
        return self._closed

    def _work(self) -> None:
        batch: list[Request] | None = []
        try:
            while (batch := self._next()) is not None:
                self._answer(batch)
        finally:  # also after an error of the program, which ends this thread: nobody may wait for ever
            self._refuse(batch or [])

    def _answer(self, batch: list[Request]) -> None:
        try:
            found = self._draw(batch)
        except (ValueError, RuntimeError) as error:  # a RuntimeError of torch, such as memory that ran out
            for request in batch:
                request.result.set_exception(error)
            return
        for request, drawn in zip(batch, found, strict=True):
            request.result.set_result(drawn)

    def _refuse(self, batch: list[Request]) -> None:
        """Close, and refuse what is left of a batch and all that waits."""
        with self._lock:
            self._closed = True
        left = [*batch, *self._held]
        while not self._waiting.empty():
            if (request := self._waiting.get()) is not None:
                left.append(request)
        for request in left:
            if not request.result.done():
                request.result.set_exception(ValueError(CLOSED))

    def _next(self) -> list[Request] | None:
        """The request that waits longest, with those behind it that join it; None = the end."""
        if not self._held:
            first = self._waiting.get()
            if first is None:
                return None
            self._held.append(first)
        while not self._waiting.empty():
            following = self._waiting.get()
            if following is None:
                return None
            self._held.append(following)
        batch, left, n = [], [], 0
        for request in self._held:
            if self._held[0].joins(request) and n + len(request.seeds) <= self.batch_size:
                batch.append(request)
                n += len(request.seeds)
            else:
                left.append(request)
        self._held = left
        return batch

    def _draw(self, batch: list[Request]) -> list[Drawn]:
        import torch

        from flashar_pl.backbones.condition import Condition
        from flashar_pl.decoding.samples import decode_images

        started = time.perf_counter()
        seeds = [seed for request in batch for seed in request.seeds]
        n, nulls = len(seeds), [r.unconditional for r in batch if r.unconditional is not None]
        # graphs are made for shapes: two of them, so that the first requests and not all of them wait for that
        size = n if "graphs" not in self.engine.runner or n == 1 else self.batch_size
        codes = self.engine.generate(
            Condition.cat([request.condition for request in batch]).pad(size),
            self.grid,
            batch[0].plan,
            seeds=seeds + seeds[-1:] * (size - n),
            unconditional=Condition.cat(nulls).pad(size) if nulls else None,
            **asdict(batch[0].sampling),
        )
        with torch.no_grad():
            images = decode_images(self.tokenizer, codes[:n]).cpu()
        seconds = time.perf_counter() - started
        return [Drawn(part, seconds, n) for part in images.split([len(request.seeds) for request in batch])]
