"""Drawing the samples of an evaluation: by one process, by several on this machine, or under torchrun.

Every process writes the parts of its own batches; nothing else passes between them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from flashar_pl.devices import find_device
from flashar_pl.evaluate.parts import PartFolder
from flashar_pl.evaluate.samples import Bench, Job, load_bench

Shared = tuple[Job, list[int]]
"""What every process needs: the job, and the batches that are missing."""
LINE_EVERY = 30.0
"""Seconds between lines of progress where standard error is no terminal."""


def draw_parts(bench: Bench, job: Job, batches: list[int], advance: Callable[[], None] = lambda: None) -> None:
    """Draw batches and write their parts; `advance` is called after each."""
    from flashar_pl.decoding.samples import draw

    folder = PartFolder(job.out)
    for drawn in draw(bench.engine, bench.tokenizer, job.samples(), batches, bench.extractor, job.side):
        folder.write(drawn, job.keep_images)
        advance()


def work(job: Job, batches: list[int], device: str) -> None:
    """The whole work of a process that is not the first."""
    import torch

    if not batches:
        return
    torch.set_num_threads(job.threads)
    if find_device(device).type == "cuda":
        torch.cuda.set_device(device)  # whatever asks for no device in particular must not go to the first GPU
    bench = load_bench(
        job.checkpoint,
        weights=job.weights,
        n_head=job.n_head,
        branch_layer=job.branch_layer,
        grid=job.grid,
        tokenizer=job.tokenizer,
        dtype=job.dtype,
        plan=job.plan,
        runner=job.runner,
        weight_format=job.weight_format,
        features=job.features,
        device=device,
    )
    draw_parts(bench, job, batches)


def _helper(number: int, job: Job, todo: list[int], ranks: int, device: str) -> None:
    """Target of a process started by `draw_on_devices`: rank number + 1."""
    rank = number + 1
    work(job, todo[rank::ranks], device_of_rank(device, rank))


def device_of_rank(device: str, rank: int) -> str:
    """The device of process `rank` on this machine: its own GPU where GPUs are used."""
    kind = find_device(device).type
    return f"cuda:{rank}" if kind == "cuda" and device in ("auto", "cuda") else device


def count_devices(devices: int | None, device: str) -> int:
    """How many processes to start here; None = one for each visible GPU, or one.

    Raises:
        ValueError: more than there are GPUs, or several processes on one named GPU.
    """
    import torch

    kind = find_device(device).type
    named = device not in ("auto", "cuda", "cpu")
    available = 1 if named else torch.cuda.device_count() if kind == "cuda" else None
    if devices is None:
        return available or 1
    if devices < 1 or (available is not None and devices > available):
        expected = "1 or more" if available is None else f"1 to {available}"
        raise ValueError(f"devices is {devices}; expected {expected} with --device {device}.")
    return devices


def draw_on_devices(bench: Bench, job: Job, todo: list[int], ranks: int, device: str, progress: Progress) -> None:
    """Draw all of `todo`: this process as rank 0, and ranks - 1 others that it starts."""
    import torch.multiprocessing as mp

    helpers = None
    if ranks > 1 and len(todo) > 1:
        helpers = mp.start_processes(
            _helper, args=(job, todo, ranks, device), nprocs=ranks - 1, join=False, daemon=True, start_method="spawn"
        )

    def advance() -> None:
        progress.update()
        if helpers is not None:
            helpers.join(timeout=0)  # raises where one has failed

    draw_parts(bench, job, todo[::ranks], advance)
    while helpers is not None and not helpers.join(timeout=1):
        progress.update()


class Group:
    """The processes of a torchrun launch; without one, this process alone."""

    def __init__(self, rank: int, ranks: int, local_rank: int) -> None:
        self.rank, self.ranks, self.local_rank = rank, ranks, local_rank

    def share(self, build: Callable[[], Shared]) -> Shared:
        """Rank 0: hand what `build` returns to every rank. Wrong input found there is raised on all of them."""
        assert self.rank == 0
        if self.ranks == 1:
            return build()
        try:
            value = build()
        except (ValueError, OSError, ImportError) as error:
            self._broadcast([None, str(error) or type(error).__name__])
            raise
        self._broadcast([value, None])
        return value

    def receive(self) -> Shared:
        """Every other rank: what rank 0 shares."""
        value, error = self._broadcast([None, None])
        if error is not None:
            raise ValueError(error)
        return value

    def _broadcast(self, message: list[Any]) -> list[Any]:
        import torch.distributed as dist

        dist.broadcast_object_list(message, src=0)
        return message

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.ranks > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def launched_group() -> Iterator[Group]:
    """The group of this launch. It talks over gloo, which works with and without GPUs; ranks may be hours apart."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "RANK" not in os.environ:
        yield Group(0, 1, 0)
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Group(dist.get_rank(), ranks, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


class Progress:
    """Images done, images per second and time left, from the parts that all processes have written."""

    def __init__(self, folder: PartFolder, batches: int, batch_size: int, n: int) -> None:
        from tqdm import tqdm

        self._folder, self._batch_size, self._n = folder, batch_size, n
        self.first = self._done()
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=n, initial=self.first, unit=" images", dynamic_ncols=True)

    def _done(self) -> int:
        return min(self._n, self._folder.count() * self._batch_size)

    def update(self) -> None:
        """Show the present state; where standard error is no terminal, at most one line in half a minute."""
        done, now = self._done(), time.monotonic()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now - self._last >= LINE_EVERY and done > self.first:
            self._last = now
            rate = (done - self.first) / (now - self._began)
            left = timedelta(seconds=round((self._n - done) / rate))
            print(f"{done:,} of {self._n:,} images, {rate:.1f} images/s, {left} left", file=sys.stderr, flush=True)

    def close(self) -> tuple[int, float]:
        """Images drawn by this run, and seconds it took."""
        if self._bar is not None:
            self._bar.close()
        return self._done() - self.first, time.monotonic() - self._began
