"""The convolutional encoder and decoder of the VQGAN family, shared by the LlamaGen VQ, the Emu3.5 IBQ and VAR's VQ.

Shapes: B images, C channels, h x w pixels, L levels, f = 2^(L-1), latents (B, Z, h/f, w/f).
Source: Esser et al. 2021 (VQGAN); parameter names are those of LlamaGen's published VQ files.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
LEVELS, BLOCKS = 16, 100
"""Most levels of a network, and residual blocks of a level; published ones have 5 or 6, and 2 to 4."""
EPS = 1e-6


@dataclass(frozen=True)
class NetSpec:
    """Sizes of an encoder or a decoder. Levels go from full resolution down to the latents in both."""

    stem: int
    """Channels after the encoder's first convolution. A decoder starts at widths[-1] and ignores it."""
    widths: tuple[int, ...]
    """Channels of each level; L levels mean L - 1 halvings."""
    blocks: int
    """Residual blocks per level."""
    attention: tuple[bool, ...]
    """For each level: does self-attention follow every residual block?"""
    latent: int
    """Channels Z between the network and the 1x1 convolution beside the quantiser."""

    def __post_init__(self) -> None:
        assert len(self.widths) == len(self.attention), "one flag for each level"
        uneven = [c for c in (self.stem, *self.widths) if c % GROUPS]
        if uneven or not 1 <= len(self.widths) <= LEVELS or not 1 <= self.blocks <= BLOCKS:
            raise ValueError(
                f"{str(self)[:400]}: expected 1 to {LEVELS} levels of 1 to {BLOCKS} blocks each, "
                f"of multiples of {GROUPS} channels."
            )

    @property
    def downsample(self) -> int:
        """Pixels per latent along each side, 2^(L-1)."""
        return 2 ** (len(self.widths) - 1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inner, eps=EPS)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outer, eps=EPS)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, outer, h, w)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, outer, h, w)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class SelfAttention(nn.Module):
    """Single-head attention over all h * w positions, scaled by C^-1/2, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h * w, C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


def halving(channels: int) -> nn.Module:
    """One row and column of zeros at the end, then a 3x3 convolution with stride 2."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


def doubling(channels: int) -> nn.Module:
    """Repetition of every row and column, then a 3x3 convolution."""
    return nn.Sequential(
        OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked for, then the change of size."""

    def __init__(self, inner: int, width: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(inner if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(SelfAttention(width) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resize = self.downsample or self.upsample
        return x if resize is None else resize(x)


class ConvNet(nn.Module):
    """Encoder, pixels (B, 3, h, w) to latents (B, Z, h/f, w/f), or decoder, the reverse.

    `conv_blocks` are in the order of computation: an encoder's begin at full resolution, a decoder's at the latents.
    """

    def __init__(self, spec: NetSpec, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        levels = list(zip(spec.widths, spec.attention))[:: -1 if decodes else 1]
        channels, inner, out = (spec.latent, spec.widths[-1], 3) if decodes else (3, spec.stem, spec.latent)
        self.conv_in = nn.Conv2d(channels, inner, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for width, attention in levels:
            self.conv_blocks.append(Level(inner, width, spec.blocks, attention))
            inner = width
        for level, (width, _) in zip(self.conv_blocks[:-1], levels):
            if decodes:
                level.upsample = doubling(width)
            else:
                level.downsample = halving(width)
        low = spec.widths[-1]
        self.mid = nn.ModuleList([ResBlock(low, low), SelfAttention(low), ResBlock(low, low)])
        self.norm_out = nn.GroupNorm(GROUPS, inner, eps=EPS)
        self.conv_out = nn.Conv2d(inner, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks) if self.decodes else (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def read_spec(state: Mapping[str, Tensor], side: str) -> NetSpec:
    """The sizes of `side` ("encoder" or "decoder") from the tensors of a state dict with this module's names.

    Raises ValueError where a tensor that carries a size is missing; every other tensor is checked by the strict load.
    """

    def shape(name: str) -> torch.Size:
        tensor = state.get(f"{side}.{name}")
        if tensor is None or tensor.ndim != 4:
            got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            first = ", ".join(sorted(state)[:3]) or "nothing"
            raise ValueError(f"'{side}.{name}' is {got}; expected a LlamaGen VQ state dict; this holds {first}, ...")
        return tensor.shape

    def count(pattern: str) -> int:
        n = 0
        while f"{side}.{pattern.format(n)}" in state:
            n += 1
        return n

    levels = range(max(1, count("conv_blocks.{}.res.0.conv1.weight")))
    widths = [shape(f"conv_blocks.{i}.res.0.conv1.weight")[0] for i in levels]
    attention = [f"{side}.conv_blocks.{i}.attn.0.q.weight" in state for i in levels]
    conv_in, conv_out = shape("conv_in.weight"), shape("conv_out.weight")
    encoder = side == "encoder"
    if not encoder:  # stored from the latents up to full resolution
        widths, attention = widths[::-1], attention[::-1]
    return NetSpec(
        stem=conv_in[0],
        widths=tuple(widths),
        blocks=count("conv_blocks.0.res.{}.conv1.weight"),
        attention=tuple(attention),
        latent=conv_out[0] if encoder else conv_in[1],
    )


def taming_name(name: str, levels: int) -> str:
    """A parameter's name in the layout of the first VQGAN files, from that of this module; `levels` of the decoder.

    Levels are `down.l` and `up.l`, both from full resolution on; the middle is block_1, attn_1, block_2.
    """
    middle = ("block_1", "attn_1", "block_2")
    name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"^((?:encoder\.down|decoder\.up)\.\d+)\.res\.", r"\1.block.", name)
    return re.sub(r"^(encoder|decoder)\.mid\.(\d)\.", lambda m: f"{m[1]}.mid.{middle[int(m[2])]}.", name)
