"""The network of VAR as a backbone: what it reads is no embedding of codes but the image so far, and it is modulated by
the class in every layer.

Shapes: B samples, R rows (B, or 2B with guidance), K scales of p_0 < ... < p_(K-1) codes a side, L = sum of p_k^2
positions, n of them in this forward, D width, A heads, E head width, C code dimension of the tokenizer, V codes.
Source: Tian et al. 2024 (VAR), Sec. 3; the layout of the files var_d16.pth .. var_d36.pth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, ClassVar, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.backbones import register_backbone
from flashar_pl.backbones.base import Backbone
from flashar_pl.backbones.condition import Condition, Conditioning
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.transformer import BlockConfig, Mask, attention
from flashar_pl.numerics import wide
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers.multi_scale_codebook import PATCH_NUMS, check_patch_nums

MAX_LOG_SCALE = log(100)
"""Largest log temperature of the attention on unit vectors."""
PLAIN_SCALE = 0.25
"""Factor besides 1 / sqrt(E) of the attention without unit vectors, as published."""


@dataclass(frozen=True)
class VARConfig:
    """Everything that defines a VAR model; the names are those of the published code."""

    depth: int
    """Number of blocks."""
    embed_dim: int
    """Width D."""
    num_heads: int
    """Heads A."""
    vocab_size: int = 4096
    """Number of codes V."""
    num_classes: int = 1000
    """Classes; class id num_classes is the null class."""
    patch_nums: tuple[int, ...] = PATCH_NUMS[256]
    """Codes a side of every scale."""
    code_dim: int = 32
    """Dimension C of the tokenizer's code vectors."""
    shared_aln: bool = False
    """Whether all blocks share one modulation, each with an offset of its own."""
    attn_l2_norm: bool = True
    """Whether queries and keys have unit length, with a learnt temperature per head."""
    mlp_ratio: float = 4.0
    """Feed-forward width over D."""
    norm_eps: float = 1e-6
    """Added to the variance in LayerNorm."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        check_patch_nums(self.patch_nums)
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}.")

    @property
    def length(self) -> int:
        """L."""
        return sum(p * p for p in self.patch_nums)

    @property
    def first(self) -> int:
        """p_0^2, the positions that see no code."""
        return self.patch_nums[0] ** 2


def _preset(depth: int, **options: Any) -> VARConfig:
    return VARConfig(depth, 64 * depth, depth, **options)


PRESETS: dict[str, VARConfig] = {
    "var-d16": _preset(16),  # 310,283,520 parameters
    "var-d20": _preset(20),  # 600,917,136
    "var-d24": _preset(24),  # 1,033,399,360
    "var-d30": _preset(30),  # 2,010,020,356
    "var-d36-s": _preset(36, patch_nums=PATCH_NUMS[512], shared_aln=True),  # 2,353,893,904
}
"""Published sizes; the last one draws 512 x 512 pixels, the others 256 x 256."""


class VARAttention(nn.Module):
    """Self-attention whose softmax has a learnt temperature per head, or the published constant."""

    zero_k_bias: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        dim, self.heads = config.embed_dim, config.num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), log(4))) if config.attn_l2_norm else None
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Mask, cache: KVCache | None, layer: int) -> Tensor:
        """x (R, n, D) -> (R, n, D)."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        joint = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # (R, n, 3, A, E)
        q, k, v = joint.permute(2, 0, 3, 1, 4)  # (R, A, n, E) each
        if self.scale_mul_1H11 is None:
            q = q * PLAIN_SCALE
        else:  # `attention` divides by sqrt(E)
            scale = wide(self.scale_mul_1H11).clamp_max(MAX_LOG_SCALE).exp() * sqrt(q.shape[-1])
            q, k = (F.normalize(wide(q), dim=-1) * scale).to(v.dtype), F.normalize(wide(k), dim=-1).to(v.dtype)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.proj(attention(q, k, v, mask))


class VARFeedForward(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = round(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, width)
        self.fc2 = nn.Linear(width, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, parts: int) -> nn.Sequential:
    """(R, 1, D) class embedding to (R, 1, parts D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class VARBlock(nn.Module):
    """x += g1 attention(LN(x) (1 + s1) + b1); x += g2 ffn(LN(x) (1 + s2) + b2), all six from the class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.dim, self.eps = config.embed_dim, config.norm_eps
        self.attn, self.ffn = VARAttention(config), VARFeedForward(config)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, self.dim) / self.dim**0.5)
        else:
            self.ada_lin = modulation(self.dim, 6)

    def modulation(self, condition: Tensor) -> Tensor:
        """(R, 1, 6, D) of the class (R, 1, D), or of what all blocks share (R, 1, 6, D)."""
        return self.ada_gss + condition if condition.ndim == 4 else self.ada_lin(condition).unflatten(-1, (6, -1))

    def forward(self, x: Tensor, six: Tensor, mask: Mask, cache: KVCache | None, layer: int) -> Tensor:
        """x (R, n, D); six (R, 1, 6, D) of `modulation`."""
        g1, g2, s1, s2, b1, b2 = six.unbind(2)  # (R, 1, D) each
        x = x + g1 * self.attn(modulate(x, s1, b1, self.eps), mask, cache, layer)
        return x + g2 * self.ffn(modulate(x, s2, b2, self.eps))


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class VARHeadNorm(nn.Module):
    """The last norm, modulated by the class too."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.ada_lin = modulation(config.embed_dim, 2)

    def forward(self, x: Tensor, two: Tensor) -> Tensor:
        """x (R, n, D); two (R, 1, 2, D), what `ada_lin` makes of the class."""
        scale, shift = two.unbind(2)
        return modulate(x, scale, shift, self.eps)


@register_backbone
class VARTransformer(Backbone):
    """The network of `VARConfig`, which `VAR` drives: its forward goes scale by scale, not slot by slot."""

    kind = "var"
    own_model = "var"
    config_type, published = VARConfig, PRESETS
    homes: ClassVar[Mapping[str, str]] = {r"var_d\d+\.pth": "https://huggingface.co/FoundationVision/var"}
    published_cfg_scale = 1.5
    config: VARConfig

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config, self.dim, self.n_layer, self.vocabulary = config, config.embed_dim, config.depth, config.vocab_size
        self.conditioning = Conditioning("class", config.num_classes, positions=0)
        self.usual_grid = (1, config.length)  # type: ignore[misc]
        dim, heads = config.embed_dim, config.num_heads
        self.block = BlockConfig(dim, heads, heads, dim // heads, round(dim * config.mlp_ratio))
        std = sqrt(1 / (3 * dim))
        self.pos_start = nn.Parameter(torch.randn(1, config.first, dim) * std)
        self.pos_1LC = nn.Parameter(torch.randn(1, config.length, dim) * std)
        self.word_embed = nn.Linear(config.code_dim, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.lvl_embed = nn.Embedding(len(config.patch_nums), dim)
        self.shared_ada_lin = modulation(dim, 6) if config.shared_aln else None
        self.blocks = nn.ModuleList(VARBlock(config) for _ in range(config.depth))
        self.head_nm = VARHeadNorm(config)
        self.head = nn.Linear(dim, config.vocab_size)

    @property
    def norm(self) -> VARHeadNorm:  # type: ignore[override]
        """The last norm."""
        return self.head_nm

    def guided(self, settings: SamplingSettings) -> bool:
        """VAR's own scale, of which 0 is off."""
        return settings.scale > 0

    def null_condition(self, condition: Condition) -> Condition:
        return condition.each(lambda ids: torch.full_like(ids, self.config.num_classes))

    def condition_linears(self) -> dict[str, nn.Linear]:
        """The modulations: of the class alone, so once an image."""
        named = self.named_modules()
        return {name: module for name, module in named if isinstance(module, nn.Linear) and "ada_lin." in name}

    def level(self) -> Tensor:
        """(L,) int64: the scale of every position."""
        sides = torch.tensor(self.config.patch_nums, device=self.head.weight.device)
        return torch.arange(len(sides), device=sides.device).repeat_interleave(sides * sides)

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Of every block (R, 1, 6, D) and of the last norm (R, 1, 2, D), from the embedded class (R, 1, D)."""
        given = condition if self.shared_ada_lin is None else self.shared_ada_lin(condition).unflatten(-1, (6, -1))
        last: Tensor = self.head_nm.ada_lin(condition).unflatten(-1, (2, -1))
        return [*(block.modulation(given) for block in self.blocks), last]  # type: ignore[operator]

    def forward(
        self, x: Tensor, modulations: list[Tensor], begin: int, mask: Mask = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (R, n, V) float32 of positions begin .. begin + n - 1, embedded as x (R, n, D); the cache grows."""
        place = slice(begin, begin + x.shape[1])
        x = x + self.lvl_embed(self.level()[place]) + self.pos_1LC[:, place]
        for layer, (block, six) in enumerate(zip(self.blocks, modulations)):
            x = block(x, six, mask, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return wide(self.head(self.head_nm(x, modulations[-1])))

    def _no_slots(self, *_: Any) -> Never:
        raise ValueError("VAR goes scale by scale and has no slots of codes; expected its own logits or generate.")

    embed = prefix = rope = _no_slots  # type: ignore[assignment]
