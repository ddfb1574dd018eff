"""Attention that skips what nobody sees, by torch's FlexAttention: a mask as blocks of positions.

Shapes: R rows, K positions, A query heads, G key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockedMask:
    """Who sees whom, for `kernel`: flex_attention, compiled or not."""

    def __init__(self, kernel: Callable[..., Tensor], blocks: BlockMask) -> None:
        self.kernel, self.blocks = kernel, blocks

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(R, K, A * E) from queries (R, A, K, E), keys and values (R, G, K, E), in the dtype of the values."""
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast does it for other attention
        y = self.kernel(q, k, v, block_mask=self.blocks, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2).flatten(2)


def blocks_of(allowed: Tensor) -> BlockMask:
    """The blocks of a mask (K, K) bool, True = may attend, that all rows share."""
    from torch.nn.attention.flex_attention import create_block_mask  # imports torch's compiler

    n = len(allowed)
    return create_block_mask(
        lambda row, head, query, key: allowed[query, key], None, None, n, n, device=str(allowed.device)
    )


def hiding(blocks: BlockMask, allowed: Tensor, visible: Tensor) -> BlockMask:
    """`blocks` of `allowed` (K, K) for rows that see only the keys `visible` (R, K), and each position itself. No block
    is taken for one that is seen entirely."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (allowed[query, key] & visible[row, key]) | (query == key)

    seen = blocks.to_dense()
    order = torch.argsort(seen, dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        seen.sum(-1, dtype=torch.int32), order, BLOCK_SIZE=blocks.BLOCK_SIZE, mask_mod=sees,
        seq_lengths=blocks.seq_lengths,
    )  # fmt: skip
