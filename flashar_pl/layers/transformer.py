"""The transformer block that all backbones share; what differs between them is `BlockConfig`.

Shapes: R rows, L positions of this forward, K visible positions, D width, A query heads, G key/value heads,
E head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flashar_pl.layers.flex import BlockedMask
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rope import Rope, apply_rope
from flashar_pl.numerics import wider

Mask = Tensor | Literal["causal"] | BlockedMask | None
"""Who sees whom: bool, broadcastable to (R, 1, L, K), True = may attend; None = everyone sees everything. "causal" =
position i sees 0..i, which needs L = K; a tensor could say the same, but no fused kernel runs with one on a GPU. A
BlockedMask, for a GPU in training, says what a tensor would, and knows no dropout."""


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of attention while decoding: those that need no preparation for a new number of keys, as cuDNN's do. Every step has
another one."""

QKNorm = Literal["none", "rms", "layer"]
NormPlace = Literal["before", "after", "both"]
NormKind = Literal["rms", "layer"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and conventions of one transformer block."""

    dim: int
    """Width D."""
    n_head: int
    """Query heads A."""
    n_kv_head: int
    """Key/value heads G; A must be a multiple."""
    head_dim: int
    """Head width E; A * E need not equal D."""
    ffn_dim: int
    """Feed-forward width F."""
    norm_eps: float = 1e-5
    """Added to the mean square, or to the variance, in norms."""
    norm: NormKind = "rms"
    """Norms of the blocks: RMSNorm, or LayerNorm with weight and bias."""
    activation: str = "silu"
    """Of the feed-forward's gate, see `ACTIVATIONS`."""
    qk_norm: QKNorm | bool = "none"
    """Norm over each head's query and key, before RoPE: "rms" with one weight for all heads, "layer" with mean, and
    weight and bias of every head. True = "rms"."""
    norm_place: NormPlace = "before"
    """Where norms stand: "before" attention and feed-forward, "after" them, inside the residual branch, or "both"."""
    qkv_bias: bool = False
    """Biases of the projection of queries, keys and values."""
    output_bias: bool = False
    """A bias of the attention's output projection."""
    ffn_bias: bool = False
    """Biases of both feed-forward projections."""
    text_ffn: bool = False
    """Whether text has a feed-forward of its own, of the same sizes; the last pair of `rope` then says what is a code
    (see `Block.forward`)."""
    text_passes: bool = False
    """Whether text passes by: other positions see it, and it stays as it is. The last pair of `rope` as above. A
    backbone may clear either for some of its blocks: `Block.text_feed_forward`, `Block.text_passes`."""
    rope_interleaved: bool = True
    """RoPE pairs: (2i, 2i + 1) if true, (i, i + E / 2) otherwise."""
    attn_dropout: float = 0.0
    """Dropout on attention probabilities."""
    resid_dropout: float = 0.0
    """Dropout after the attention output projection."""
    ffn_dropout: float = 0.0
    """Dropout after the feed-forward output projection."""

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}.")
        if isinstance(self.qk_norm, bool):
            object.__setattr__(self, "qk_norm", "rms" if self.qk_norm else "none")
        choices = {"qk_norm": get_args(QKNorm), "norm_place": get_args(NormPlace), "norm": get_args(NormKind)}
        for name, words in {**choices, "activation": tuple(ACTIVATIONS)}.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(words)}.")

    @classmethod
    def of(cls, model: Any, **own: Any) -> BlockConfig:
        """What a model's configuration says under the same names, and `own`, which wins."""
        return cls(**{each.name: getattr(model, each.name) for each in fields(cls) if hasattr(model, each.name)} | own)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32, returned in the wider dtype of the two. One kernel on a GPU."""

    scale = 1.0
    """What the result is multiplied by."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wider(x.dtype, self.weight.dtype)
        return self.scaled(F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps))

    def scaled(self, x: Tensor) -> Tensor:
        """x times `scale`."""
        return x if self.scale == 1 else x * self.scale


class LayerNorm(RMSNorm):
    """(x - mean(x)) / std(x) * weight + bias, in the same precision."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wider(x.dtype, self.weight.dtype)
        dims, weight, bias = self.weight.shape, self.weight.to(dtype), self.bias.to(dtype)
        return self.scaled(F.layer_norm(x.to(dtype), dims, weight, bias, self.eps))


NORMS: dict[str, type[RMSNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class HeadNorm(nn.Module):
    """LayerNorm over the width E of each head, with weight and bias (heads, E) of their own (Chameleon)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        """(R, L, heads, E) -> the same, in its dtype."""
        dtype = wider(x.dtype, self.weight.dtype)
        normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=1e-5)  # the published one is fixed
        return normed * self.weight.to(dtype) + self.bias.to(dtype)


def head_norm(config: BlockConfig, heads: int) -> nn.Module:
    """The norm of queries or keys of `heads` heads."""
    if config.qk_norm == "layer":
        return HeadNorm(heads, config.head_dim)
    return RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm == "rms" else nn.Identity()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """(R, L, A * E) from queries (R, A, L, E), keys and values (R, G, K, E), in a form that fused kernels accept.

    The GPU kernels that take a mask know no grouped heads and, in 16 bit, only head widths that are multiples of 8;
    otherwise all probabilities would be written to memory. So the A / G queries that share a key become rows of one
    head, which saves repeating the keys too, and heads are padded with zeros.
    """
    heads, n, width = q.shape[1:]
    groups, shared = k.shape[1], heads // k.shape[1]
    if isinstance(mask, BlockedMask):
        assert dropout == 0
        return mask.attend(q, k, v)
    if isinstance(mask, str):
        assert n == k.shape[2], "positions that see only themselves would be missing"
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=shared > 1)
        return y.transpose(1, 2).flatten(2)
    if shared > 1:
        q = q.unflatten(1, (groups, shared)).flatten(2, 3)  # (R, G, A / G * L, E)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.repeat(*[1] * (mask.ndim - 2), shared, 1)  # (1 or R, 1, A / G * L, K)
    if mask is not None and q.is_cuda and width % 8:
        q, k, v = (F.pad(part, (0, -width % 8)) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=width**-0.5)[..., :width]
    return y.unflatten(2, (shared, n)).permute(0, 3, 1, 2, 4).flatten(2)  # one copy at most


class Attention(nn.Module):
    """Grouped-query attention. One projection holds the row blocks [q; k; v]."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        self.wqkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=config.output_bias)
        self.q_norm = head_norm(config, config.n_head)
        self.k_norm = head_norm(config, config.n_kv_head)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R, A, L, E), keys and values (R, G, L, E) of x (R, L, D)."""
        joint = self.wqkv(x).unflatten(-1, (-1, self.config.head_dim))  # (R, L, A + 2G, E)
        q, k, v = joint.split(self.heads, dim=2)
        normed = self.config.qk_norm != "none"
        qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2) if normed else joint[:, :, : -v.shape[2]]
        q, k = apply_rope(qk, rope, self.config.rope_interleaved).split(self.heads[:2], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: KVCache | None, layer: int) -> Tensor:
        """Attention outputs (R, L, A * E), before the output projection."""
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (R, G, K, E)
        y = attention(q.to(k.dtype), k, v, mask, self.config.attn_dropout if self.training else 0.0)
        return y.to(q.dtype)

    def output(self, y: Tensor) -> Tensor:
        """(R, L, A * E) -> (R, L, D)."""
        return F.dropout(self.wo(y), self.config.resid_dropout, self.training)


class FeedForward(nn.Module):
    """w2(act(w1 x) * w3 x), SwiGLU with silu. One projection holds the row blocks [w1; w3]."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.dropout, self.activation = config.ffn_dropout, ACTIVATIONS[config.activation]
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return F.dropout(self.w2(self.activation(gate) * up), self.dropout, self.training)


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h)), norms placed by `norm_place`.

    `before` and `after` are all of it that depends neither on the cache nor on the mask: what is worth compiling.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place != "before"
        norm = partial(NORMS[config.norm], config.dim, config.norm_eps)
        self.attention_norm = norm() if before else nn.Identity()
        self.attention = Attention(config)
        self.attention_post_norm = norm() if after else nn.Identity()
        self.ffn_norm = norm() if before else nn.Identity()
        self.feed_forward = FeedForward(config)
        self.text_feed_forward: FeedForward | None = FeedForward(config) if config.text_ffn else None
        self.knows_text, self.text_passes = config.text_ffn or config.text_passes, config.text_passes
        self.ffn_post_norm = norm() if after else nn.Identity()
        self.recompute = False
        """Keep only the inputs for the backward pass, which runs the block again (activation checkpointing)."""

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R, A, L, E), keys and values (R, G, L, E) of x (R, L, D)."""
        return self.attention.project(self.attention_norm(x), rope)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """(R, L, D) from x (R, L, D) and the attention outputs y (R, L, A * E)."""
        x = x + self.attention_post_norm(self.attention.output(y))
        return x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
        n_text: int | None = None,
    ) -> Tensor:
        """x (R, L, D) -> (R, L, D).

        With a cache, keys and values are appended to its `layer` and everything filled so far is visible. Where text
        is treated otherwise, `rope` has a pair more: 1 at positions that are codes, 0 at text, which is in the prefix
        alone: what comes after a prefix is codes. n_text: see `text_length`; None = text may be anywhere.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, rope, mask, cache, layer, n_text, use_reentrant=False)
        return self._compute(x, rope, mask, cache, layer, n_text)

    def _compute(
        self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, layer: int, n_text: int | None
    ) -> Tensor:
        code = None
        if self.knows_text:
            rope, code = rope[..., :-1, :], rope[..., -1, :1] > 0  # (X, L, 1)
        q, k, v = self.before(x, rope)
        y = self.attention.attend(q, k, v, mask, cache, layer)
        if code is None or (cache is not None and cache.filled):
            return self.after(x, y)
        if self.text_feed_forward is None:
            return torch.where(code, self.after(x, y), x) if self.text_passes else self.after(x, y)
        x = x + self.attention_post_norm(self.attention.output(y))
        h = self.ffn_norm(x)
        y, text = self.feed_forward(h), self.text_feed_forward(h[:, :n_text])  # (R, L, D), (R, n_text, D)
        first = torch.where(code[:, :n_text], y[:, :n_text], text)
        return x + self.ffn_post_norm(torch.cat([first, y[:, first.shape[1] :]], dim=1))


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, first_layer: int
) -> Tensor:
    """x (R, L, D) through `blocks`; `first_layer` is the cache layer of the first one."""
    blocks = list(blocks)
    apart = cache is None and any(getattr(block, "text_feed_forward", None) is not None for block in blocks)
    known = {"n_text": text_length(rope)} if apart else {}
    for offset, block in enumerate(blocks):
        x = block(x, rope, mask, cache, first_layer + offset, **known)
    return x


def text_length(rope: Rope) -> int:
    """Position from which on all are codes in every row, by the last pair of `rope` (X, L, ., 2). It waits for a GPU,
    once for many blocks: their feed-forward of text would else run on a whole image, 40 % of the work."""
    text = (rope[..., -1, 0] <= 0).any(dim=0)  # (L,)
    return int(((torch.arange(len(text), device=text.device) + 1) * text).max())


@contextmanager
def decode_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its mode restored afterwards, and attention by one of `KERNELS`."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with sdpa_kernel(KERNELS):
            yield
    finally:
        for module in training:
            module.training = True
