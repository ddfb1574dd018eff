"""Decoding as CUDA graphs: recorded once, then replayed without any work on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import torch

from flashar_pl.decoding.loop import Buffers, Inputs, Progress, decode
from flashar_pl.grid import DecodePlan
from flashar_pl.models.base import GridModel
from flashar_pl.options import SamplingSettings

STEPS_PER_GRAPH = 32
"""Decoding steps in one graph. A 16 x 16 diagonal decoding is one graph; a graph of 1,024 raster steps of 64 layers
would hold two million kernels."""


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings: cuBLAS keeps a workspace, tens of MB, for every stream it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def warmed(device: torch.device, run: Callable[[], object]) -> Iterator[torch.cuda.Stream]:
    """The stream of recordings, after `run` has run there: libraries and compilers allocate at the first run."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # a caller's autocast keeps the weights it has cast and frees them when it ends: graphs must not read those
    with torch.cuda.device(device), torch.autocast(device.type, enabled=False, cache_enabled=False):
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        yield stream


def captured(run: Callable[[], object], pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """What `run` starts, as a graph."""
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # which a capture that fails would not restore
    with here, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph


def record(device: torch.device, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One graph of what `function` does. It has run once before, and its results stand in its buffers."""
    with warmed(device, function) as stream:
        return captured(function, None, stream)


class Recording:
    """The loop of `flashar_pl.decoding.loop` for one model, plan, settings and shapes.

    Every graph holds consecutive steps, each step with its exact shapes and the slice of the cache that it sees. They
    share one memory pool: they are replayed in order, never at once. The model's parameters must stay where they are.
    """

    def __init__(self, model: GridModel, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs) -> None:
        self.plan = plan  # the graphs read its tensors
        self.inputs = inputs.clone()
        self.buffers = Buffers.allocate(model, plan, inputs)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        device, pool = inputs.prefix.x.device, torch.cuda.graph_pool_handle()

        def steps() -> Generator[int]:
            return decode(model, plan, settings, self.inputs, self.buffers)

        with warmed(device, lambda: deque(steps(), 0)) as stream:
            left = steps()
            for _ in range(0, plan.n_steps, STEPS_PER_GRAPH):
                self.graphs.append(captured(lambda: deque(islice(left, STEPS_PER_GRAPH), 0), pool, stream))

    def replay(self, inputs: Inputs, on_step: Callable[[Progress], object]) -> Buffers:
        """Decode other inputs of the same shapes. The next replay overwrites the result.

        on_step is called once for every step, after the graph that holds it was launched.
        """
        self.inputs.copy_(inputs)
        for i, graph in enumerate(self.graphs):
            graph.replay()
            for t in range(i * STEPS_PER_GRAPH, min((i + 1) * STEPS_PER_GRAPH, self.plan.n_steps)):
                on_step(Progress(self.plan, t + 1, self.buffers.drawn))
        return self.buffers
