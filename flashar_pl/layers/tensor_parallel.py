"""Layers cut over a group of devices, each of which holds a share of the weights and all of the activations.

Of a block the first product of attention and of the MLP is cut by its outputs (heads, and the width in between), the
second by its inputs: one sum over the devices, an all-reduce, ends either (Megatron-LM, Shoeybi et al., 2019, Sec. 3).
Embeddings are cut by their width and heads by their codes; an all-gather puts the results together. What is whole
(norms, gate, the draw) each device computes for itself, where the last bits may differ: the codes are those that the
first one draws, see `Share.from_first`. Nothing waits for the host: a CUDA graph can hold it. For inference, without
gradients.

Shapes: N devices, D width, A query heads, G key/value heads, E head width, F feed-forward width, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.layers.transformer import Block, BlockConfig, HeadNorm


@dataclass(frozen=True)
class Share:
    """This process's place in a group of N that hold one model together, and the device of its share."""

    group: Any
    device: torch.device

    @property
    def world(self) -> int:
        """N."""
        return dist.get_world_size(self.group)

    def cut(self, whole: Tensor, axis: int, sections: Sequence[tuple[int, int]]) -> nn.Parameter:
        """This device's part of a weight, copied to the device.

        sections: (length, parts) of each along the axis. Of fewer than N parts, N / parts devices hold the same one.
        """
        rank, taken = dist.get_rank(self.group), []
        for section, (_, parts) in zip(whole.detach().split([length for length, _ in sections], axis), sections):
            taken.append(section.chunk(parts, axis)[rank * parts // self.world])
        return nn.Parameter(torch.cat(taken, axis).to(self.device), requires_grad=False)

    def linear(self, whole: nn.Linear, sections: Sequence[tuple[int, int]]) -> nn.Linear:
        """Some outputs of a projection."""
        weight = self.cut(whole.weight, 0, sections)
        made = nn.Linear(weight.shape[1], len(weight), bias=whole.bias is not None, device="meta")
        made.weight = weight
        if whole.bias is not None:
            made.bias = self.cut(whole.bias, 0, sections)
        return made

    def gathered(self, part: Tensor) -> Tensor:
        """(..., n) of every device side by side: (..., N n)."""
        parts = part.new_empty(self.world * len(part), *part.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(parts, part.contiguous(), group=self.group)
        return parts.unflatten(0, (self.world, -1)).movedim(0, -2).flatten(-2)

    def from_first(self, values: Tensor) -> Tensor:
        """The first device's values, on all: sums of probabilities need not have equal bits on two GPUs, and devices
        that had once drawn unlike codes would add up states of unlike images from then on."""
        values = values.contiguous()
        dist.broadcast(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values


class SummedLinear(nn.Module):
    """x W^T + b where every device has some of the inputs: the sum of their products."""

    def __init__(self, whole: nn.Linear, share: Share) -> None:
        super().__init__()
        self.share = share
        self.weight = share.cut(whole.weight, 1, [(whole.in_features, share.world)])
        self.bias = None if whole.bias is None else share.cut(whole.bias, 0, [(len(whole.bias), 1)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in / N) -> (..., n_out)."""
        y = F.linear(x, self.weight)
        dist.all_reduce(y, group=self.share.group)
        return y if self.bias is None else y + self.bias


class GatheredLinear(nn.Module):
    """x W^T + b of which every device computes some outputs. Where N does not divide them, zeros fill up."""

    def __init__(self, share: Share, weight: Tensor, bias: Tensor | None) -> None:
        """weight (n_out, n_in), bias (n_out,)."""
        super().__init__()
        self.share, self.n_out = share, len(weight)
        missing = -self.n_out % share.world
        sections = [(self.n_out + missing, share.world)]
        self.weight = share.cut(F.pad(weight, (0, 0, 0, missing)) if missing else weight, 0, sections)
        self.bias = None if bias is None else share.cut(F.pad(bias, (0, missing)), 0, sections)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return self.share.gathered(F.linear(x, self.weight, self.bias))[..., : self.n_out]


class GatheredEmbedding(nn.Module):
    """A table (n, D) of which every device holds D / N columns."""

    def __init__(self, whole: nn.Embedding, share: Share) -> None:
        super().__init__()
        self.share = share
        self.weight = share.cut(whole.weight, 1, [(whole.embedding_dim, share.world)])

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        return self.share.gathered(F.embedding(ids, self.weight))


def divides(config: BlockConfig, n: int) -> bool:
    """Whether N devices can hold a block: equal numbers of query heads and feed-forward width, and whole key/value
    heads, each on one device or on several."""
    heads, kv = config.n_head, config.n_kv_head
    return heads % n == config.ffn_dim % n == 0 and (kv % n == 0 or n % kv == 0)


def share_of(config: BlockConfig, n: int) -> BlockConfig:
    """The sizes of each of N shares of a block."""
    kv = max(1, config.n_kv_head // n)
    return replace(config, n_head=config.n_head // n, n_kv_head=kv, ffn_dim=config.ffn_dim // n)


def cut_block(block: Block, share: Share) -> None:
    """Leave this device's share of a block. Its input and output stay whole."""
    attention: Any = block.attention
    whole, n = block.attention.config, share.world
    assert divides(whole, n), f"{n} devices cannot hold {whole}"
    own = attention.config = share_of(whole, n)
    kv_parts = min(n, whole.n_kv_head)
    parts = ((whole.n_head, n), (whole.n_kv_head, kv_parts), (whole.n_kv_head, kv_parts))
    attention.heads = [own.n_head, own.n_kv_head, own.n_kv_head]
    attention.wqkv = share.linear(attention.wqkv, [(heads * whole.head_dim, of) for heads, of in parts])
    attention.wo = SummedLinear(attention.wo, share)
    for norm, part in zip((attention.q_norm, attention.k_norm), parts):
        if isinstance(norm, HeadNorm):
            norm.weight, norm.bias = share.cut(norm.weight, 0, [part]), share.cut(norm.bias, 0, [part])
    mlps: tuple[Any, ...] = (block.feed_forward, block.text_feed_forward)
    for mlp in mlps:
        if mlp is not None:
            mlp.w13 = share.linear(mlp.w13, [(whole.ffn_dim, n)] * 2)
            mlp.w2 = SummedLinear(mlp.w2, share)
