"""Peak memory of a block of code, counted tensor by tensor. `devices.peak_memory` is what the system sees."""

import weakref
from typing import Any

from torch import Tensor

from flashar_pl.layers.torch_private import DispatchMode


class TensorPeak(DispatchMode):
    """The largest number of bytes held at once by tensors that are made inside it: `bytes`.

    A dispatch mode sees every tensor that an operator takes or returns. A storage that is returned before it was taken
    is new and adds its bytes; a finalizer takes them away when it is freed. The peak is exact for tensors, the same in
    every run, and blind to the allocator, to scratch space inside one operator and to tensors that existed before. It
    does not see the backward pass of GPU tensors, which runs on a thread of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.bytes = 0
        self._known: dict[int, int] = {}  # bytes that a storage adds: 0 if it existed before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, new=True)
        self.bytes = max(self.bytes, self.live)
        return result

    def _note(self, tree: Any, new: bool) -> None:
        if isinstance(tree, dict | list | tuple):
            for part in tree.values() if isinstance(tree, dict) else tree:
                self._note(part, new)
        elif isinstance(tree, Tensor):
            storage = tree.untyped_storage()  # the same object as long as it lives
            key = id(storage)
            if key not in self._known:
                self._known[key] = storage.nbytes() if new else 0
                self.live += self._known[key]
                weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key)
