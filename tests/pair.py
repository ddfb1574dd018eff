"""Two processes as the two ranks of a job, started once a session for every check that needs them.

    def test_sum(pair: Pair) -> None:
        assert pair(add, 3) == [7, 7]

`pair(function, *arguments)` calls a function of a module in both at the same time, inside one gloo group, and returns
their results in order of rank. Lightning finds the group and trains in it. An error in one of them is raised here, with
its traceback, and the next call starts two new processes.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LEFT = ("PL_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")
"""Variables by which a new process would take itself for one of several; Lightning leaves them behind."""


def clean_environment() -> dict[str, str]:
    """This environment without what Lightning and process groups leave in it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LEFT)} | {"OMP_NUM_THREADS": "1"}


def _work(rank: int, store: str, connection: Connection) -> None:
    environment = clean_environment()
    os.environ.clear()
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(environment | job | {"LOCAL_RANK": str(rank)})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:  # the session is over
            return
        try:
            function, arguments = pickle.loads(task)
            answer = (True, function(*arguments))
        except BaseException:  # noqa: BLE001 (also SystemExit: the caller hears of it)
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class Pair:
    """The two processes; they start at the first call."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
        """What `function(*arguments)` returns on either rank. Raises AssertionError with the tracebacks of failures."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < 2 and (left := end - time.monotonic()) > 0:
            waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks) if rank not in answers}
            for connection in wait(list(waiting), left):
                try:
                    answers[waiting[connection]] = pickle.loads(connection.recv_bytes())  # type: ignore[index, union-attr]
                except EOFError:
                    answers[waiting[connection]] = (False, "the process died")  # type: ignore[index]
            if not all(fine for fine, _ in answers.values()):
                end = min(end, time.monotonic() + 3)  # the other one may have something to say
        failures = [f"rank {rank}: {found}" for rank, (fine, found) in sorted(answers.items()) if not fine]
        if failures or len(answers) < 2:
            self.close()
            raise AssertionError("\n".join(failures) or f"ranks that answered in {timeout} s: {sorted(answers)}")
        return [answers[rank][1] for rank in (0, 1)]

    def _start(self) -> None:
        start = multiprocessing.get_context("forkserver")
        start.set_forkserver_preload(["lightning.pytorch", "flashar_pl.training.module"])  # imported once for both
        store = Path(tempfile.mkdtemp(prefix="pair")) / "store"
        for rank in (0, 1):
            ours, theirs = start.Pipe()
            process = start.Process(target=_work, args=(rank, str(store), theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []
