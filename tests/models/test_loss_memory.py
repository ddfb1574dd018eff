"""Memory of the loss, in bytes of live tensors.

The loss's own share is the peak of a forward and backward pass minus that of the same pass with a loss that is the
sum of the hidden states at the same sources.
"""

from collections.abc import Callable

import pytest
import torch
from tensor_peak import TensorPeak
from torch import Tensor

from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.models import FlashAR, dual_head

VOCABULARY, BATCH, SIDE = 16384, 3, 16
THREE_LOGITS = 3 * BATCH * SIDE * SIDE * VOCABULARY * 4


def peak(run: Callable[[], object]) -> int:
    with TensorPeak() as meter:
        run()
    return meter.bytes


def sums(fused: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A loss that needs no memory, in the form of `dual_nll`."""
    parts = fused, h.sum(-1), v.sum(-1)
    return sum(part.sum() for part in parts), *(part.detach() for part in parts)  # type: ignore[return-value]


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
        patch.setattr(dual_head, "dual_nll", lambda h, v, gate, _: sums(h.x.sum(-1)[: len(gate)] + gate, h.x, v.x))
        without = peak(run)
    assert with_loss - without < 0.2 * THREE_LOGITS, (
        f"{(with_loss - without) / THREE_LOGITS:.3f} of three sets of logits"
    )

    with torch.no_grad():
        assert peak(lambda: model(codes, ids)) > THREE_LOGITS, "the plain form is what it is measured against"
