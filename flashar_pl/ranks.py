"""One way to work on many devices: every rank runs the same function over its share `range(rank, n, world)`.

Lightning Fabric starts the ranks of this machine, or joins those that torchrun or SLURM started. Results pass through
files that the ranks write; between ranks go only small values and errors, so that wrong input found by one rank ends
all of them, with one message. Lightning is imported only where several ranks are.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from flashar_pl.console import progress_bar
from flashar_pl.devices import find_device
from flashar_pl.options import RankOptions

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
CPU = torch.device("cpu")
WRONG_INPUT = (ValueError, OSError, ImportError)
"""Errors that every rank shall hear of; any other one is a fault of the program, and kills the ranks."""
PATIENCE = timedelta(days=7)
"""How long a rank waits for the slowest one."""


@dataclass(frozen=True)
class Rank:
    """This process's place among those that do one piece of work together; the default is one that works alone."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    def share(self, n: int) -> range:
        """The numbers of 0 .. n - 1 that are this rank's."""
        return range(self.rank, n, self.world)

    def say(self, news: str) -> None:
        """Tell what comes next, once, on standard error."""
        if self.rank == 0:
            print(news, file=sys.stderr, flush=True)

    def first(self, build: Callable[[], T]) -> T:
        """What `build` returns on rank 0, on every rank. Every rank must call this; only rank 0 calls `build`."""
        return cast(T, self._exchange(build() if self.rank == 0 else None)[0])

    def progress(self, total: int, unit: str) -> AbstractContextManager[Callable[[int], Any]]:
        """A progress bar of this rank's share, shown by rank 0 for all: `with rank.progress(...) as advance`."""
        if self.rank > 0:
            return nullcontext(lambda n: None)
        return progress_bar(total, unit if self.world == 1 else f"{unit} on each of {self.world} devices")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Every rank must call this; values should be small."""
        return self._exchange(value)

    def barrier(self) -> None:
        """Return when every rank is here. Raises ValueError where another one has ended with wrong input."""
        self._exchange(None)

    def _exchange(self, value: Any, error: str | None = None) -> list[Any]:
        """Every rank's value. The only kind of meeting there is, so a rank that ends early cannot be missed."""
        if self.world == 1:
            return [value]
        met = gather((value, error))
        if error is None:
            for other in met:
                if other[1] is not None:
                    raise _Elsewhere(other[1])
        return [other[0] for other in met]


class _Elsewhere(ValueError):
    """Another rank has ended with this message, and every rank knows."""


def gather(value: T, group: torch.distributed.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, on all of them; of small values, in a process group if there is one. None = the usual one."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group)
    return values


def leave_group_at_exit() -> None:
    """End this process's group before the interpreter ends: threads of gloo that outlive it abort the process."""
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_on_ranks(work: Callable[[Rank], T], options: RankOptions, device: str = "auto", option: str = "devices") -> T:
    """Call `work(rank)` on every rank; returns what the call of this machine's first rank returned.

    Under torchrun or SLURM the ranks are the processes they started, and each of them returns from here. Otherwise
    `options.devices` processes are started on this machine (`work` must then be picklable: a module's function, or a
    `partial` of one with plain values), and with one device `work` is called here, without a group.

    Args:
        work: does `rank.share(n)` of the work on `rank.device`; may meet the others in `rank.first` and
            `rank.barrier`. A ValueError, OSError or ImportError in any rank ends all of them, at their next meeting
            or at their end.
        options: how many.
        device: auto, cpu, cuda or cuda:N; with auto and cuda each rank gets its own GPU.
        option: that told how many, for messages.

    Raises:
        ValueError: devices that do not exist, or wrong input found by any rank.
        ChildProcessError: a rank was killed.
    """
    place = find_device(device)
    started = _started_here()
    if started and options.devices not in (None, started[0]):
        raise ValueError(
            f"{option} is {options.devices}, but {started[0]} processes were started on each machine; "
            f"{'leave it out' if option == 'devices' else 'give their number'}."
        )
    devices, nodes = started or (_count(options.devices, device, place, option), options.num_nodes)
    if devices * nodes == 1:
        return work(Rank(device=place))
    return _launch(work, place.type, devices, nodes)


def _started_here() -> tuple[int, int] | None:
    """(processes of each machine, machines) where torchrun or srun started them; read without importing Lightning."""
    if torch.distributed.is_torchelastic_launched():
        world, nodes = os.environ["WORLD_SIZE"], os.environ.get("GROUP_WORLD_SIZE", "1")
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world, nodes = os.environ["SLURM_NTASKS"], os.environ.get("SLURM_NNODES", "1")
    else:
        return None
    return int(world) // int(nodes), int(nodes)


def _launch(work: Callable[[Rank], T], kind: str, devices: int, nodes: int) -> T:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    own_port = "MASTER_PORT" not in os.environ
    external = _started_here() is not None or "LOCAL_RANK" in os.environ
    strategy = DDPStrategy(
        process_group_backend="gloo",  # only small objects pass, and a rank may wait for hours
        timeout=PATIENCE,
        start_method="popen" if external else "spawn",
    )
    try:
        fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy)
    except RuntimeError as error:  # SLURM's variables say something that Lightning does not take
        raise ValueError(str(error)) from error
    try:
        value, wrong = fabric.launch(partial(_of_rank, work))
    except torch.multiprocessing.ProcessExitedException as ended:
        raise ChildProcessError(
            f"{ended}: killed from outside, perhaps for want of memory. What is finished stays; run the same command "
            "again."
        ) from ended
    finally:
        if own_port and not external:
            os.environ.pop("MASTER_PORT", None)  # the next launch shall choose its own
    if wrong is not None:
        raise ValueError(wrong)
    return value


def _of_rank(work: Callable[[Rank], T], fabric: Fabric) -> tuple[T | None, str | None]:
    """(what `work` returned, what went wrong on this or any other rank)."""
    leave_group_at_exit()
    rank = Rank(fabric.global_rank, fabric.world_size, fabric.device)
    try:
        value = work(rank)
        rank.barrier()
    except _Elsewhere as error:
        return None, str(error)
    except WRONG_INPUT as error:
        message = str(error) or type(error).__name__
        rank._exchange(None, message)
        return None, message
    return value, None


def _count(devices: int | None, device: str, place: torch.device, option: str) -> int:
    """Processes of this machine. Raises ValueError where there are not so many devices."""
    named = place.type == "cuda" and device not in ("auto", "cuda")
    available = 1 if named else torch.cuda.device_count() if place.type == "cuda" else None
    if devices is None:
        return available or 1
    if devices < 1 or (available is not None and devices > available):
        expected = "1 or more" if available is None else f"1 to {available}" if available > 1 else "1"
        raise ValueError(f"{option} is {devices}; expected {expected} with device {device}.")
    return devices
