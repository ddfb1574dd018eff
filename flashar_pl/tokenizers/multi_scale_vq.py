"""VAR's tokenizer: an image is K grids of codes, each of which describes what the smaller ones have left.

Shapes: B images of S x S pixels, K scales of p_0 < ... < p_(K-1) = P codes a side, S = f P with f pixels per code of
the last one, L = sum of p_k^2 codes in all, V code vectors of dimension D.
Source: Tian et al. 2024 (VAR), Algorithms 1 and 2; the file vae_ch160v4096z32.pth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.numerics import strict_float32
from flashar_pl.renames import Rename, official_state_dict
from flashar_pl.tokenizers.conv_tokenizer import (
    Codebook,
    ConvTokenizer,
    TokenizerSpec,
    best_codes,
    codebook_shape,
    load_strict,
)
from flashar_pl.tokenizers.convnet import NetSpec, taming_name

WHAT = "the state dict of VAR's multi-scale VQ"
HITS = "quantize.ema_vocab_hit_SV"
PATCH_NUMS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""The published scales, by side of the image in pixels."""


@dataclass(frozen=True)
class MultiScaleSpec(TokenizerSpec):
    """All sizes of a `MultiScaleVQ`."""

    patch_nums: tuple[int, ...] = PATCH_NUMS[256]
    """p_0 .. p_(K-1)."""
    phis: int = 4
    """Convolutions phi that the scales share (the published `share_quant_resi`); 1 = one, 0 = each scale its own."""
    residual: float = 0.5
    """r in phi(h) = (1 - r) h + r conv(h)."""

    def __post_init__(self) -> None:
        check_patch_nums(self.patch_nums)
        if self.phis < 0 or not 0 < self.residual <= 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"share_quant_resi {self.phis}, quant_resi {self.residual}, quant_conv_ks {self.kernel}; expected 0 or "
                "more, a weight above 0 and up to 1, and an odd number."
            )


class Phi(nn.Module):
    """(1 - r) h + r conv(h): softens what the enlargement of a small grid leaves."""

    def __init__(self, dim: int, residual: float) -> None:
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return (1 - self.residual) * h + self.residual * self.conv(h)


class MultiScaleCodebook(Codebook):
    """The code vectors, the convolutions phi, and the published counter of used codes (K', V), which does nothing."""

    def __init__(self, spec: MultiScaleSpec) -> None:
        super().__init__(spec.codes, spec.dim)
        scales = len(spec.patch_nums)
        self.phi = nn.ModuleList(Phi(spec.dim, spec.residual) for _ in range(spec.phis or scales))
        self.phi_of = phi_index(scales, spec.phis)
        self.register_buffer("hits", torch.zeros(scales, spec.codes))


class MultiScaleVQ(ConvTokenizer):
    """The multi-scale VQ of VAR, of any size. Codes are the nearest vectors; nothing is scaled to unit length.

    Ids are (B, L): the scales from small to large, raster inside a scale. Images are square, of P f pixels a side.
    """

    unit_norm = False
    spec: MultiScaleSpec
    quantize: MultiScaleCodebook

    def __init__(self, spec: MultiScaleSpec) -> None:
        super().__init__(spec)
        self.patch_nums = spec.patch_nums
        self.length = sum(p * p for p in spec.patch_nums)

    def make_codebook(self) -> MultiScaleCodebook:
        return MultiScaleCodebook(self.spec)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> MultiScaleVQ:
        """Loads a state dict in the published layout, bare or under "ema" (wins), "model" or "state_dict"; copied.

        config: ch, ch_mult, num_res_blocks, z_channels and patch_nums, and where they are not the published ones
        share_quant_resi (4), quant_resi (0.5) and quant_conv_ks (3). The codebook's size is that of its tensor.
        Raises ValueError where config and tensors disagree, and for any tensor that is missing, left over or of
        another shape.
        """
        state = official_state_dict(state_dict)[0]
        spec = read_spec(config, *codebook_shape(state, WHAT))
        hits = state.get(HITS)

        def build() -> MultiScaleVQ:
            model = cls(spec)
            if isinstance(hits, Tensor) and hits.ndim == 2:  # of as many scales as the file was trained with
                model.quantize.register_buffer("hits", torch.empty(hits.shape[0], spec.codes))
            return model

        return load_strict(build, state, f"{WHAT} (patch_nums {list(spec.patch_nums)})")

    def renames(self) -> list[Rename]:
        """One published convolution `qkv` holds the rows of our three."""
        found = []
        for rename in super().renames():
            if named := re.fullmatch(r"(.*\.attn[._]\d+)\.([qkv])\.(\w+)", rename.pieces[0]):
                width = self.state_dict()[rename.ours].shape[0]
                rename = Rename(rename.ours, (f"{named[1]}.qkv.{named[3]}",), skip="qkv".index(named[2]) * width)
            found.append(rename)
        return found

    def official_name(self, name: str) -> str:
        name = taming_name(name, len(self.spec.decoder.widths))
        if name == "quantize.hits":
            return HITS
        for q in range(len(self.quantize.phi)):
            inside = f"quant_resi.{q}" if self.spec.phis == 0 else f"quant_resi.qresi_ls.{q}"
            inside = "quant_resi.qresi" if self.spec.phis == 1 else inside
            name = name.replace(f"quantize.phi.{q}.conv.", f"quantize.{inside}.")
        return name

    def config(self) -> dict[str, Any]:
        """The published settings, as `from_official` takes them."""
        encoder, spec = self.spec.encoder, self.spec
        return {
            "ch": encoder.stem,
            "ch_mult": [width // encoder.stem for width in encoder.widths],
            "num_res_blocks": encoder.blocks,
            "z_channels": spec.dim,
            "vocab_size": spec.codes,
            "patch_nums": list(spec.patch_nums),
            "share_quant_resi": spec.phis,
            "quant_resi": spec.residual,
            "quant_conv_ks": spec.kernel,
        }

    def from_uint8(self, images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def to_uint8(self, images: Tensor) -> Tensor:
        return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)

    def check_images(self, images: Tensor, floating: bool) -> None:
        super().check_images(images, floating)
        side = self.patch_nums[-1] * self.downsample
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise ValueError(
                f"images are {height} x {width} pixels; expected {side} x {side}: patch_nums end with "
                f"{self.patch_nums[-1]}, {self.downsample} pixels per code."
            )

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError unless `codes` is (B, L) int64 with values below `vocabulary`."""
        check_ids(codes, self.length, self.vocabulary, "this tokenizer")

    def decode_float(self, codes: Tensor) -> Tensor:
        """Ids (B, L) int64 to images (B, 3, S, S) float32, clamped to [-1, 1]."""
        return super().decode_float(codes).clamp(-1, 1)

    @torch.no_grad()
    def decode_latents(self, total: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32, clamped to [-1, 1], from the sum of all scales (B, D, P, P)."""
        self.check_weights()
        with strict_float32(total.device.type):
            return self.decoder(self.post_quant_conv(total)).clamp(-1, 1)

    def look_up(self, z: Tensor) -> Tensor:
        """Ids (B, L) of latents (B, D, P, P), Algorithm 1: every scale describes what is left of z."""
        table = self.quantize.embedding.weight  # (V, D)
        # |z - e|^2 is least where <z, e> - |e|^2 / 2 is largest
        extended = torch.cat([table, table.square().sum(1, keepdim=True) / -2], dim=1)  # (V, D + 1)
        rest, found = z, []
        for k, side in enumerate(self.patch_nums):
            rows = shrink(rest, side).movedim(1, -1).flatten(0, 2)  # (B p_k^2, D)
            ids = best_codes(F.pad(rows, (0, 1), value=1.0), extended).view(len(z), -1)
            rest = rest - self.scale(k, table[ids])
            found.append(ids)  # (B, p_k^2)
        return torch.cat(found, dim=1)

    def latents(self, codes: Tensor) -> Tensor:
        """The sum of all scales (B, D, P, P) of ids (B, L), Algorithm 2."""
        return self.running_sums(codes)[-1]

    def running_sums(self, ids: Tensor) -> list[Tensor]:
        """The sum (B, D, P, P) of the scales up to each, of ids (B, L)."""
        sums: list[Tensor] = []
        for k, part in enumerate(ids.split([p * p for p in self.patch_nums], dim=1)):
            h = self.scale(k, F.embedding(part, self.quantize.embedding.weight))
            sums.append(sums[-1] + h if sums else h)
        return sums

    def scale(self, k: int, vectors: Tensor) -> Tensor:
        """What scale k adds: its vectors (B, p_k^2, D) enlarged to (B, D, P, P), through its phi."""
        side, last = self.patch_nums[k], self.patch_nums[-1]
        h = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, D, p_k, p_k)
        if side != last:
            h = F.interpolate(h, (last, last), mode="bicubic")
        return self.quantize.phi[self.quantize.phi_of[k]](h)

    def next_input(self, total: Tensor, k: int) -> Tensor:
        """What VAR sees at scale k + 1: the sum of scales 0..k (B, D, P, P), shrunk to (B, p_(k+1)^2, D)."""
        return shrink(total, self.patch_nums[k + 1]).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def var_input(self, ids: Tensor) -> Tensor:
        """(B, L - p_0^2, D) float32: what VAR sees at scales 1..K-1 where the ids (B, L) come before it."""
        self.check_codes(ids)
        self.check_weights()
        with strict_float32(ids.device.type):
            sums = self.running_sums(ids)[:-1]
            return torch.cat([self.next_input(total, k) for k, total in enumerate(sums)], dim=1)


def shrink(x: Tensor, side: int) -> Tensor:
    """(B, D, P, P) to (B, D, side, side): means over areas."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def phi_index(scales: int, phis: int) -> list[int]:
    """Which of the `phis` every scale uses (0 = its own): the first of equally spaced ticks nearest to k / (K - 1).

    Some distances are equal but for rounding; float64 as written here decides as the published code does.
    """
    if phis == 0:
        return list(range(scales))
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    return [int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales)]


def check_patch_nums(patch_nums: Sequence[int]) -> None:
    """Raises ValueError unless there are two scales or more, growing."""
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(a >= b for a, b in pairwise(patch_nums)):
        raise ValueError(f"patch_nums is {list(patch_nums)}; expected two or more growing sides, for example 1,2,3,4.")


def check_ids(ids: Tensor, length: int, vocabulary: int, what: str) -> None:
    """Raises ValueError unless `ids` is (B, length) int64 with values below `vocabulary`."""
    if ids.ndim != 2 or ids.shape[1] != length or ids.dtype != torch.int64:
        raise ValueError(f"ids is {tuple(ids.shape)} {ids.dtype}; {what} expects (B, {length}) int64, all scales.")
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids lie in {low} .. {high}; {what} has codes 0 .. {vocabulary - 1}.")


def published_settings(side: int = 256) -> dict[str, Any]:
    """Settings of the published file for images of `side` x `side` pixels, as `MultiScaleVQ.from_official` takes them.

    One file serves both sides; only the scales differ. ValueError for a side without published scales.
    """
    if side not in PATCH_NUMS:
        raise ValueError(f"side is {side}; expected one of {', '.join(map(str, PATCH_NUMS))}.")
    sizes = {"ch": 160, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 32, "vocab_size": 4096}
    return {**sizes, "patch_nums": list(PATCH_NUMS[side])}


def read_spec(config: Mapping[str, Any], codes: int, dim: int) -> MultiScaleSpec:
    """Sizes from published settings; `codes` and `dim` are those of the codebook's tensor, and must agree with them."""
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels", "patch_nums")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(
            f"the settings of the multi-scale VQ lack {', '.join(missing)}; they have {', '.join(config)}."
        )
    for key, found in (("vocab_size", codes), ("z_channels", dim)):
        if config.get(key, found) != found:
            raise ValueError(f"the settings say {key} = {config[key]}, but the codebook's tensor says {found}.")
    if config.get("using_znorm", False):
        raise ValueError("the settings have using_znorm = True; this reader knows only False, as published.")
    widths = tuple(int(config["ch"]) * int(multiplier) for multiplier in config["ch_mult"])
    attention = (False,) * (len(widths) - 1) + (True,)
    encoder = NetSpec(int(config["ch"]), widths, int(config["num_res_blocks"]), attention, dim)
    return MultiScaleSpec(
        encoder,
        replace(encoder, stem=widths[-1], blocks=encoder.blocks + 1),
        codes,
        dim,
        kernel=int(config.get("quant_conv_ks", 3)),
        patch_nums=tuple(int(p) for p in config["patch_nums"]),
        phis=int(config.get("share_quant_resi", 4)),
        residual=float(config.get("quant_resi", 0.5)),
    )
