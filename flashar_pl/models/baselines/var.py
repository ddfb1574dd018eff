"""VAR: next-scale prediction. All codes of one scale are drawn at once, given all smaller scales.

A model of its own, not a plan over slots: what it reads is no embedding of codes but the image so far, shrunk to the
size of the next scale by the tokenizer, and it is modulated by the class in every layer.

Shapes: B samples, R rows (B, or 2B with guidance), K scales of p_0 < ... < p_(K-1) codes a side, L = sum of p_k^2
positions, n of them in this forward, D width, A heads, E head width, C code dimension of the tokenizer, V codes.
Source: Tian et al. 2024 (VAR), Sec. 3; the layout of the files var_d16.pth .. var_d36.pth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, log, sqrt
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.transformer import Mask, attention
from flashar_pl.numerics import sample_seeds, strict_float32, uniforms, wide
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import check_usable, choose, guide, unusable
from flashar_pl.tokenizers.multi_scale_vq import PATCH_NUMS, MultiScaleVQ, check_ids, check_patch_nums

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

    def forward(self, x: Tensor, condition: Tensor, mask: Mask, cache: KVCache | None, layer: int) -> Tensor:
        """x (R, n, D); condition: of the class (R, 1, D), where all blocks share one modulation (R, 1, 6, D)."""
        six = self.ada_gss + condition if condition.ndim == 4 else self.ada_lin(condition).unflatten(-1, (6, -1))
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

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).chunk(2, dim=-1)
        return modulate(x, scale, shift, self.eps)


class VAR(nn.Module):
    """A VAR model; see `VARConfig`. Conditions are class ids (B,) int64, num_classes = the null class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        dim, scales = config.embed_dim, len(config.patch_nums)
        std = sqrt(1 / (3 * dim))
        self.pos_start = nn.Parameter(torch.randn(1, config.first, dim) * std)
        self.pos_1LC = nn.Parameter(torch.randn(1, config.length, dim) * std)
        self.word_embed = nn.Linear(config.code_dim, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.lvl_embed = nn.Embedding(scales, dim)
        self.shared_ada_lin = modulation(dim, 6) if config.shared_aln else None
        self.blocks = nn.ModuleList(VARBlock(config) for _ in range(config.depth))
        self.head_nm = VARHeadNorm(config)
        self.head = nn.Linear(dim, config.vocab_size)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> VAR:
        """A model from a published state dict, in the dtype of its weights; copied.

        config: patch_nums, depth, embed_dim and num_heads, and where they are not the published ones vocab_size (4096),
        num_classes (1000), shared_aln (False), attn_l2_norm (True), mlp_ratio (4) and norm_eps (1e-6). Other entries
        are not read. ValueError where config and tensors disagree, and for tensors that are missing, left over or of
        another shape.
        """
        return resolve_name("flashar_pl.checkpoints.var:read_official")(state_dict, config)

    def to_official(self) -> dict[str, Tensor]:
        """The published state dict, bit-exact inverse of `from_official`."""
        return resolve_name("flashar_pl.checkpoints.var:write_official")(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.head.weight.dtype

    def level(self) -> Tensor:
        """(L,) int64: the scale of every position."""
        sides = torch.tensor(self.config.patch_nums, device=self.head.weight.device)
        return torch.arange(len(sides), device=sides.device).repeat_interleave(sides * sides)

    def logits(self, ids: Tensor, x: Tensor, classes: Tensor) -> Tensor:
        """(B, L, V) float32, teacher-forced: [i] predicts ids[i] from all smaller scales.

        ids (B, L) int64, x (B, L - p_0^2, C) = `MultiScaleVQ.var_input(ids)`, classes (B,) int64.
        """
        check_ids(ids, self.config.length, self.config.vocab_size, "this VAR model")
        condition = self._embed_classes(classes, len(ids))
        expected = (len(ids), self.config.length - self.config.first, self.config.code_dim)
        if tuple(x.shape) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}: MultiScaleVQ.var_input(ids).")
        seen = torch.cat([self._start(condition), self.word_embed(x.to(self.dtype))], dim=1)  # (B, L, D)
        level = self.level()
        return self._forward(seen, condition, 0, mask=level[:, None] >= level[None])

    def loss(self, ids: Tensor, x: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """{"loss": mean cross-entropy in nats over all positions}, of the arguments of `logits`; nothing is dropped."""
        logits = self.logits(ids, x, classes)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}

    @torch.no_grad()
    def generate(
        self,
        classes: Tensor,
        *,
        tokenizer: MultiScaleVQ,
        cfg_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seeds: int | Tensor | list[int] | None = None,
        on_scale: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Ids (B, L) int64 of images of the given classes (B,), scale by scale, K forwards over a cache.

        cfg_scale: VAR's own, which grows over the scales: (1 + t) c - t u with t = cfg_scale k / (K - 1). 0 is off (no
        second row). The other settings and `seeds` are those of `flashar_pl.decoding.generate`; a sample's uniforms
        belong to its positions 0 .. L - 1. on_scale: called with k and the guided logits (B, p_k^2, V) of the scale.

        Raises ValueError for a tokenizer that is not the model's, for settings out of range, and where logits are NaN
        or infinite.
        """
        self.check_tokenizer(tokenizer)
        if not 0 <= cfg_scale < inf:
            raise ValueError(f"cfg_scale is {cfg_scale}; expected 0 or more (0 = no guidance).")
        settings = SamplingSettings(cfg_scale, None, temperature, top_k, top_p, greedy)
        condition = self._embed_classes(classes, len(classes))
        noise = uniforms(sample_seeds(seeds, len(classes)), self.config.length).to(condition.device)
        if cfg_scale:
            null = torch.full_like(classes, self.config.num_classes)
            condition = torch.cat([condition, self._embed_classes(null, len(null))])
        drawn = self._draw(condition, tokenizer, settings, noise, on_scale)
        return torch.cat(drawn, dim=1)

    def _draw(
        self,
        condition: Tensor,
        tokenizer: MultiScaleVQ,
        settings: SamplingSettings,
        noise: Tensor,
        on_scale: Callable[[int, Tensor], object] | None,
    ) -> list[Tensor]:
        """Ids (B, p_k^2) of every scale; condition (R, 1, D), noise (B, L)."""
        config, batch, rows = self.config, len(noise), len(condition)
        spec = CacheSpec(config.depth, config.num_heads, config.embed_dim // config.num_heads)
        cache = KVCache(spec, rows, config.length, self.dtype, condition.device)
        x, total = self._start(condition), None
        drawn, broken = [], []
        for k, side in enumerate(config.patch_nums):
            begin, n = cache.filled, side * side
            logits = self._forward(x, condition, begin, cache=cache)  # (R, n, V)
            if rows > batch:
                given, null = logits.chunk(2)
                logits = guide(given, null, 1 + settings.scale * k / (len(config.patch_nums) - 1))
            if on_scale is not None:
                on_scale(k, logits)
            broken.append(unusable(logits))
            ids = choose(logits, noise[:, begin : begin + n], settings)  # (B, n)
            drawn.append(ids)
            if k + 1 < len(config.patch_nums):
                with strict_float32(ids.device.type):
                    added = tokenizer.scale(k, F.embedding(ids, tokenizer.quantize.embedding.weight))
                    total = added if total is None else total + added  # (B, C, P, P)
                    seen = tokenizer.next_input(total, k)  # (B, p_(k+1)^2, C)
                x = self.word_embed(seen.to(self.dtype)).repeat(rows // batch, 1, 1)
        check_usable(torch.stack(broken), self.dtype)
        return drawn

    def check_tokenizer(self, tokenizer: MultiScaleVQ) -> None:
        """ValueError where scales, number of codes, code dimension or device are not the model's; it names both."""
        tokenizer.check_weights()
        pairs = {
            "patch_nums": (list(tokenizer.patch_nums), list(self.config.patch_nums)),
            "codes": (tokenizer.vocabulary, self.config.vocab_size),
            "code dimension": (tokenizer.spec.dim, self.config.code_dim),
            "device": (str(tokenizer.quantize.embedding.weight.device), str(self.head.weight.device)),
        }
        if odd := [f"{name} {its} and {own}" for name, (its, own) in pairs.items() if its != own]:
            raise ValueError(f"the tokenizer is not this model's: tokenizer and model have {', '.join(odd)}.")

    def _embed_classes(self, classes: Tensor, batch: int) -> Tensor:
        """(B, 1, D). ValueError unless `classes` is (batch,) int64 of 0 .. num_classes."""
        if classes.shape != (batch,) or classes.dtype != torch.int64:
            raise ValueError(f"classes is {tuple(classes.shape)} {classes.dtype}; expected ({batch},) int64.")
        if batch and not 0 <= int(classes.min()) <= int(classes.max()) <= self.config.num_classes:
            raise ValueError(
                f"classes lie in {int(classes.min())} .. {int(classes.max())}; this model has 0 .. "
                f"{self.config.num_classes - 1}, and {self.config.num_classes} = no class."
            )
        return self.class_emb(classes.to(self.head.weight.device))[:, None]

    def _start(self, condition: Tensor) -> Tensor:
        """(R, p_0^2, D): what the first scale sees."""
        return condition + self.pos_start

    def _forward(
        self, x: Tensor, condition: Tensor, begin: int, mask: Mask = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (R, n, V) float32 of positions begin .. begin + n - 1, embedded as x (R, n, D); the cache grows."""
        place = slice(begin, begin + x.shape[1])
        x = x + self.lvl_embed(self.level()[place]) + self.pos_1LC[:, place]
        given = condition if self.shared_ada_lin is None else self.shared_ada_lin(condition).unflatten(-1, (6, -1))
        for layer, block in enumerate(self.blocks):
            x = block(x, given, mask, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return wide(self.head(self.head_nm(x, condition)))
