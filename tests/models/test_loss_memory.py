"""Memory of the loss, in bytes of live tensors.

Method: a dispatch mode sees every tensor that an operator returns. A storage seen for the first time adds its bytes;
a finalizer on it takes them away when it is freed. The peak is therefore exact for tensors and blind to the
allocator, to scratch space inside one operator and to the interpreter, which resident memory would include.
The loss's own share is the peak of a forward and backward pass minus that of the same pass with a loss that is the
sum of the hidden states at the same sources.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.models import FlashAR, dual_head

VOCABULARY, BATCH, SIDE = 16384, 3, 16
THREE_LOGITS = 3 * BATCH * SIDE * SIDE * VOCABULARY * 4


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes held at once by tensors made inside the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.live -= n_bytes


def peak(run: Callable[[], object]) -> int:
    with PeakBytes() as meter:
        run()
    return meter.peak


def test_the_meter_counts() -> None:
    """A blind meter would pass every test below."""

    def run() -> None:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a[1:].view(-1) + 1  # views add nothing; 3,996
        del a
        c = torch.cat([b, b])  # 7,992 after 4,000 were freed
        c.mul_(2)

    assert peak(run) == 3996 + 7992


def test_loss_takes_less_than_a_fifth_of_three_sets_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaGenConfig(dim=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, num_classes=5, multiple_of=16)
    model = FlashAR(LlamaGen(config), 1)
    codes, ids = torch.randint(0, VOCABULARY, (BATCH, SIDE, SIDE)), torch.arange(BATCH)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(codes, ids)["loss"].backward()

    run()  # fills the caches of plans and masks
    with_loss = peak(run)
    with monkeypatch.context() as patch:
        patch.setattr(dual_head, "head_nll", lambda x, weight, labels: x.sum(-1))
        patch.setattr(
            dual_head, "dual_nll", lambda h, v, gate, *rest: (h.sum(-1)[: len(gate)] + gate, h.sum(-1), v.sum(-1))
        )
        without = peak(run)
    assert with_loss - without < 0.2 * THREE_LOGITS, (
        f"{(with_loss - without) / THREE_LOGITS:.3f} of three sets of logits"
    )

    with torch.no_grad():
        assert peak(lambda: model(codes, ids)) > THREE_LOGITS, "the plain form is what it is measured against"
