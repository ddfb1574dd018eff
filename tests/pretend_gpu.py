"""Tensors that say they are on a GPU, for tests on machines without one.

A `GPUTensor` holds an ordinary tensor and computes with it, so results are those of the CPU. But its device is cuda:0;
an operation on it and on a tensor of the CPU is an error, as on a GPU; and whatever would make the host wait for the
device is noted in `PretendGPU.waits`: copies between the two, and operations whose result or shape depends on values.
`torch.autocast("cuda")` acts on the CPU. CUDA graphs are lists of operations, replayed on the memory they were recorded
with; a wait while one is recorded is an error.

Speed, kernels and streams are not covered, nor what C++ code allocates by device.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
WAITS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "repeat_interleave", "argwhere",
}  # fmt: skip
"""Operations whose result, or its shape, the host needs."""
TAKES_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations on tensors of the GPU that accept indices on the CPU."""

PHYSICAL = {"_conj": torch.ops.aten.conj_physical.default, "_neg_view": torch.ops.aten.neg.default}
"""Views that set a bit of a tensor, which is not looked at below Python, and what computes the same."""


class GPUTensor(Tensor):
    """A tensor that says it is on cuda:0."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: Tensor) -> None:
        assert not isinstance(inner, GPUTensor)
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GPUTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendGPU.current is not None, f"{func} outside of `with PretendGPU()`"
        return PretendGPU.current.run(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        assert PretendGPU.current is not None
        return PretendGPU.current.move(self, args, kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy


class PretendGPU(TorchFunctionMode):
    """Inside, "cuda" is a device. One at a time."""

    current: PretendGPU | None = None

    def __init__(self, visible: bool = False) -> None:
        """visible: torch.cuda answers too: one idle GPU of 16 GB, on which nothing takes time or memory."""
        super().__init__()
        self.visible = visible
        self.waits: list[str] = []
        """What has made the host wait, and where."""
        self.graph: Graph | None = None
        """The CUDA graph that is recorded now."""
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        assert PretendGPU.current is None
        PretendGPU.current = self
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            self._patches.enter_context(patch.object(torch, name, _on_cpu(getattr(torch, name))))
        generator = torch.Generator
        made = type("Generator", (), {"__new__": lambda cls, device="cpu": generator()})  # annotations name the class
        self._patches.enter_context(patch.object(torch, "Generator", made))
        graph = inspect.signature(torch.cuda.graph)
        replaced = {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "synchronize": lambda device=None: self.wait("synchronize"),
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": Graph,
            "graph": lambda *args, **kwargs: self._capture(graph.bind(*args, **kwargs).arguments["cuda_graph"]),
        }
        if self.visible:
            replaced |= VISIBLE
        for name, value in replaced.items():
            self._patches.enter_context(patch.object(torch.cuda, name, value))
        clipping, group = torch.nn.utils.clip_grad, torch.utils._foreach_utils._group_tensors_by_device_and_dtype
        regrouped = lambda tensors, *rest: {  # noqa: E731
            (lists[0][0][0].device, key[1]): lists for key, lists in group(tensors, *rest).items()
        }
        self._patches.enter_context(patch.object(clipping, group.__name__, regrouped))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        PretendGPU.current = None

    @contextmanager
    def never_waits(self) -> Iterator[None]:
        """AssertionError if the host waits for the device inside."""
        before = len(self.waits)
        yield
        found = self.waits[before:]
        assert not found, "the host waits for the device:\n" + "\n".join(dict.fromkeys(found))

    def wait(self, what: str) -> None:
        """Note a wait."""
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        ours = [
            f"{frame.filename.split('/')[-1]}:{frame.lineno} {frame.line}"
            for frame in traceback.extract_stack()
            if "flashar_pl" in frame.filename
        ]
        self.waits.append(f"{what} in {ours[-1] if ours else 'a test'}")

    # --- what torch is asked for ------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda):
            return self.move(args[0], args[1:] if func is Tensor.to else ("cuda",), kwargs)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if func is torch._C._nn.pad_sequence and isinstance(args[0][0], GPUTensor):  # its C++ code allocates by device
            return self._made(func, args, kwargs)
        if _is_cuda(kwargs.get("device")) and func is not torch._C._nn._parse_to:
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
                self.wait("a copy to the device")
            return self._made(func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _each(_inner, args), _each(_inner, kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        out = func(*args, **kwargs)
        if self.graph is not None:
            self.graph.operations.append((func, args, kwargs, out))
        return GPUTensor(out).requires_grad_(requires_grad)

    def move(self, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        """`Tensor.to`."""
        words = [*args, *kwargs.values()]
        targets = [
            w.device if isinstance(w, Tensor) else w for w in words if isinstance(w, Tensor | torch.device | str)
        ]
        to_cuda = _is_cuda(targets[0]) if targets else isinstance(tensor, GPUTensor)
        dtype = next(
            (w.dtype if isinstance(w, Tensor) else w for w in words if isinstance(w, torch.dtype | Tensor)), None
        )
        if to_cuda != isinstance(tensor, GPUTensor):
            asynchronous = kwargs.get("non_blocking", False) and getattr(tensor, "pinned", False)
            if not asynchronous:
                self.wait(f"a copy {'to' if to_cuda else 'from'} the device")
            assert not (torch.is_grad_enabled() and tensor.grad_fn is not None), "not covered: gradients across devices"
            copied = _inner(tensor).detach().clone()
            tensor = GPUTensor(copied) if to_cuda else copied
        form = kwargs.get("memory_format") or torch.preserve_format
        if form == torch.preserve_format and (dtype is None or dtype == tensor.dtype):
            return tensor
        with torch._C.DisableTorchFunction():
            return Tensor.to(tensor, dtype or tensor.dtype, memory_format=form)

    # --- operations on GPU tensors ----------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation, some argument of which is on the GPU."""
        name = func._schema.name.removeprefix("aten::")
        tensors = _tensors((args, kwargs))
        others = [each for each in tensors if not isinstance(each, GPUTensor)]
        if name in TAKES_INDEX:
            indices = [each for each in args[1] if each is not None]
            others = [each for each in others if not any(each is index for index in indices)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("a boolean index")
            if any(not isinstance(index, GPUTensor) for index in indices):
                self.wait("a copy of an index to the device")
        if torch._C._current_graph_task_id() != -1:  # autograd allocates zeros by device, in C++
            others = [each for each in others if each.any()]
        if name == "copy_" and others:
            self.wait("a copy between devices")
        elif any(each.ndim for each in others):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}: "
                f"{[(tuple(each.shape), each.device) for each in tensors]}"
            )
        if name in WAITS:
            self.wait(name)
        func = PHYSICAL.get(name, func)
        plain_args, plain_kwargs = _each(_inner, args), _each(_inner, kwargs)
        if "device" in plain_kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        out = func(*plain_args, **plain_kwargs)
        if self.graph is not None:
            self.graph.operations.append((func, plain_args, plain_kwargs, out))
        known = {id(each.inner): each for each in tensors if isinstance(each, GPUTensor)}
        on_cpu = name == "copy_" and not isinstance(args[0], GPUTensor)
        return args[0] if on_cpu else _each(lambda each: _wrapped(each, known), out)

    @contextmanager
    def _capture(self, graph: Graph) -> Iterator[None]:
        assert self.graph is None
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None


class Graph:
    """What a recording has run, to be run again on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        """Run all operations; results go where they went before."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """A stream; all of them are one."""

    def __init__(self, device: Any = None) -> None:
        assert device is None or _is_cuda(device)

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self) -> Event:
        return Event()


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


VISIBLE: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_name": lambda device=None: "NVIDIA Pretended",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**34, major=9, minor=0),
    "mem_get_info": lambda device=None: (2**34, 2**34),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": None,
    "is_current_stream_capturing": lambda: False,
    "Event": Event,
}
"""What torch.cuda says of the machine."""


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, GPUTensor) else value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of everything in nested tuples, lists and dictionaries; faster than `torch.utils._pytree`."""
    if isinstance(value, tuple | list):
        parts = [_each(change, part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {key: _each(change, part) for key, part in value.items()}
    return change(value)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def _wrapped(value: Any, known: dict[int, GPUTensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else GPUTensor(value)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a device type, with the CPU in place of a GPU."""

    def call(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return call
