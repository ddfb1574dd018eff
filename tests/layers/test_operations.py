"""How many kernels a layer launches: at one image, a GPU spends most of a step on starting them."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import angles_1d, rotations
from flashar_pl.layers.transformer import Block, BlockConfig

LLAMAGEN = BlockConfig(dim=32, n_head=4, n_kv_head=4, head_dim=8, ffn_dim=48)
EMU35 = BlockConfig(
    dim=32, n_head=4, n_kv_head=2, head_dim=8, ffn_dim=48, qk_norm=True, rope_interleaved=False
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(part.alias_info is not None and not part.alias_info.is_write for part in function._schema.returns)
        if not view and not function.__name__.startswith(("empty", "_unsafe_view", "detach")):
            self.counted[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def one_kernel(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """Stands for `F.rms_norm`, which is one kernel on a GPU and eight operations here."""
    return torch.add(x.contiguous(), 0)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        # norms 2, products 4, rotation 3, cache 2, attention 1, SwiGLU 2, residuals 2
        (LLAMAGEN, 16),
        # and norms of queries and keys with copies 4, joining them 1, queries and outputs in the order of heads 2
        (EMU35, 23),
    ],
    ids=["llamagen", "emu35"],
)
@pytest.mark.parametrize("positions", [1, 5])
def test_a_cached_layer_launches_few_kernels(config: BlockConfig, most: int, positions: int) -> None:
    """Guards a stray copy or cast, which costs as much as a product of a small model."""
    block = Block(config).to(torch.bfloat16).eval()
    cache = KVCache(CacheSpec(1, config.n_kv_head, config.head_dim), 2, 20, torch.bfloat16, "cpu")
    rope = rotations(angles_1d(torch.arange(20), config.head_dim, 10000.0)[None])
    before, x = torch.randn(2, 10, 32).bfloat16(), torch.randn(2, positions, 32).bfloat16()
    with torch.no_grad(), patch("torch.nn.functional.rms_norm", one_kernel):
        block(before, rope[:, :10], None, cache)
        cache.advance(10)
        with Launches() as launches:
            block(x, rope[:, 10 : 10 + positions], None, cache)
    assert launches.counted.total() <= most, launches.counted
