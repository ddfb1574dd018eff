"""Writing a checkpoint while training goes on.

What is written is a copy in host memory. One thread of each process writes, and these threads meet in a gloo group of
their own: no collective of the training waits for them, or is taken for one of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flashar_pl.console import first_line
from flashar_pl.training.sharded.units import local


class Background:
    """A thread that does one work after another, with a process group for it. All processes make one.

    device: this process's own. A new thread is on the first GPU, whose streams torch's writer asks for: every process
    would take memory there.
    """

    def __init__(self, timeout: timedelta, device: torch.device) -> None:
        self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", begin)
        self._works: list[Future[None]] = []

    def begin(self, work: Callable[[], object]) -> None:
        """Do `work` after what was begun before, and only if that went well."""
        before = tuple(self._works)

        def unless_failed() -> None:
            if not any(each.exception() for each in before):
                work()

        self._works.append(self._thread.submit(unless_failed))

    @property
    def failed(self) -> bool:
        """Whether `finish` would raise at once."""
        return any(each.done() and each.exception() is not None for each in self._works)

    def finish(self) -> None:
        """Wait for everything that was begun; raises what it raised, once."""
        wait(self._works)
        ended, self._works = self._works, []
        for each in ended:
            each.result()

    def close(self) -> None:
        """The same at the end, where an error is said and not raised: another one may be on its way."""
        wait(self._works)
        for error in filter(None, (each.exception() for each in self._works)):
            rank_zero_warn(f"a checkpoint was not written: {first_line(error)}")
        self._thread.shutdown()
        torch.distributed.destroy_process_group(self.group)


@torch.no_grad()
def host_copy(tensor: Tensor) -> Tensor:
    """A copy of this device's part in CPU memory, of a tensor that is sharded or not; a sharded one stays so."""
    copy = tensor.detach().to("cpu", copy=True)
    here = local(copy)
    if hasattr(here, "__tensor_flatten__"):  # torchao's moments of 8 bits: on a CPU such a copy shares its parts
        for name in here.__tensor_flatten__()[0]:
            setattr(here, name, getattr(here, name).clone())
    return copy
