"""VAR's tokenizer: an image is K grids of codes, each of which describes what the smaller ones have left.

Shapes: B images of S x S pixels, K scales of p_0 < ... < p_(K-1) = P codes a side, S = f P with f pixels per code of
the last one, L = sum of p_k^2 codes in all, V code vectors of dimension D.
Source: Tian et al. 2024 (VAR), Algorithms 1 and 2; the file vae_ch160v4096z32.pth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.numerics import strict_float32
from flashar_pl.renames import Rename, official_state_dict
from flashar_pl.text_files import naming
from flashar_pl.tokenizers.base import GREY
from flashar_pl.tokenizers.conv_tokenizer import (
    ConvTokenizer,
    TokenizerSpec,
    best_codes,
    check_codebook,
    check_settings,
    codebook_shape,
    load_strict,
    net_specs,
)
from flashar_pl.tokenizers.convnet import taming_name
from flashar_pl.tokenizers.files import read_weights, require_file
from flashar_pl.tokenizers.multi_scale_codebook import PATCH_NUMS, MultiScaleCodebook, check_patch_nums, shrink

WHAT = "the state dict of VAR's multi-scale VQ"
ADVICE = "VAR's file is vae_ch160v4096z32.pth of https://huggingface.co/FoundationVision/var."
HITS = "quantize.ema_vocab_hit_SV"


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


class MultiScaleVQ(ConvTokenizer):
    """The multi-scale VQ of VAR, of any size. Codes are the nearest vectors; nothing is scaled to unit length.

    Ids are (B, L), or (B, 1, L) as the commands pass them: the scales from small to large, raster inside a scale.
    Images are square, of P f pixels a side.
    """

    unit_norm = False
    spec: MultiScaleSpec
    quantize: MultiScaleCodebook

    def __init__(self, spec: MultiScaleSpec) -> None:
        super().__init__(spec)
        self.scales_given = True

    def make_codebook(self) -> MultiScaleCodebook:
        spec = self.spec
        return MultiScaleCodebook(spec.codes, spec.dim, spec.patch_nums, spec.phis, spec.residual)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """p_0 .. p_(K-1)."""
        return self.quantize.patch_nums

    @property
    def length(self) -> int:
        """L."""
        return sum(p * p for p in self.patch_nums)

    @classmethod
    def from_file(
        cls,
        weights: str | Path | None = None,
        patch_nums: Sequence[int] | None = None,
        decode_dtype: str = "float32",
    ) -> MultiScaleVQ:
        """Loads a published file; all sizes but the scales are those of its tensors.

        patch_nums: None = those of 256 x 256 pixels, until a VAR model says which it has (`scales_given` is False).
        Raises ValueError for a file that is missing or unsuitable.
        """
        file = require_file(weights, "multi-scale VQ weights file", ADVICE)
        with naming(file):
            state = official_state_dict(read_weights(file))[0]
            model = cls.from_official(state, {**tensor_sizes(state), "patch_nums": patch_nums or PATCH_NUMS[256]})
        model.scales_given = patch_nums is not None
        model.opened(weights, decode_dtype)
        return model

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
        return {
            "kind": "multi_scale_vq",
            "weights": self.weights,
            "patch_nums": list(self.patch_nums),
            "decode_dtype": self.decode_dtype,
        }

    def check_images(self, images: Tensor, floating: bool) -> None:
        super().check_images(images, floating)
        height, width = images.shape[2:]
        if (height, width) != (size := self.image_size((1, self.length))):
            raise ValueError(
                f"images are {height} x {width} pixels; expected {size[0]} x {size[1]}: patch_nums end with "
                f"{self.patch_nums[-1]}, {self.downsample} pixels per code."
            )

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(S, S), whatever the grid."""
        side = self.patch_nums[-1] * self.downsample
        return side, side

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError unless `codes` is (B, L) or (B, 1, L) int64 with values below `vocabulary`."""
        check_ids(flat(codes), self.length, self.vocabulary, "this tokenizer")

    def decode_float(self, codes: Tensor) -> Tensor:
        """Ids (B, L) or (B, 1, L) int64 to images (B, 3, S, S) float32, clamped to [-1, 1]."""
        return super().decode_float(flat(codes))

    def decode_partial(self, codes: Tensor) -> Tensor:
        """The sum of the scales that are drawn; grey before the first."""
        ids = flat(codes)
        known = ids[:, (ids >= 0).all(0)]
        if not known.numel():
            return torch.full((len(ids), 3, *self.image_size((1, self.length))), GREY, dtype=torch.uint8)
        with strict_float32(ids.device.type):
            return self.to_uint8(self.decode_latents(self.quantize.running_sums(known)[-1]))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32, clamped to [-1, 1], from the sum of all scales (B, D, P, P)."""
        return super().decode_latents(latents).clamp(-1, 1)

    def look_up(self, z: Tensor) -> Tensor:
        """Ids (B, L) of latents (B, D, P, P), Algorithm 1: every scale describes what is left of z."""
        table = self.quantize.embedding.weight  # (V, D)
        # |z - e|^2 is least where <z, e> - |e|^2 / 2 is largest
        extended = torch.cat([table, table.square().sum(1, keepdim=True) / -2], dim=1)  # (V, D + 1)
        rest, found = z, []
        for k, side in enumerate(self.patch_nums):
            rows = shrink(rest, side).movedim(1, -1).flatten(0, 2)  # (B p_k^2, D)
            ids = best_codes(F.pad(rows, (0, 1), value=1.0), extended).view(len(z), -1)
            rest = rest - self.quantize.scale(k, ids)
            found.append(ids)  # (B, p_k^2)
        return torch.cat(found, dim=1)

    def latents(self, codes: Tensor) -> Tensor:
        """The sum of all scales (B, D, P, P) of ids (B, L), Algorithm 2."""
        return self.quantize.running_sums(codes)[-1]

    @torch.no_grad()
    def var_input(self, ids: Tensor) -> Tensor:
        """(B, L - p_0^2, D) float32: what VAR sees at scales 1..K-1 where the ids (B, L) come before it."""
        self.check_codes(ids)
        self.check_weights()
        with strict_float32(ids.device.type):
            sums = self.quantize.running_sums(ids)[:-1]
            return torch.cat([self.quantize.next_input(total, k) for k, total in enumerate(sums)], dim=1)


def flat(codes: Tensor) -> Tensor:
    """Ids (B, L) of (B, L) or (B, 1, L)."""
    return codes.flatten(1) if codes.ndim == 3 and codes.shape[1] == 1 else codes


def check_ids(ids: Tensor, length: int, vocabulary: int, what: str) -> None:
    """Raises ValueError unless `ids` is (B, length) int64 with values below `vocabulary`."""
    if ids.ndim != 2 or ids.shape[1] != length or ids.dtype != torch.int64:
        raise ValueError(f"ids is {tuple(ids.shape)} {ids.dtype}; {what} expects (B, {length}) int64, all scales.")
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids lie in {low} .. {high}; {what} has codes 0 .. {vocabulary - 1}.")


def tensor_sizes(state: Mapping[str, Any]) -> dict[str, Any]:
    """All published settings that the tensors of a state dict tell, that is, all but patch_nums and quant_resi.

    Raises ValueError for the state dict of another network.
    """
    _, dim = codebook_shape(state, WHAT)
    name = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    blocks = {(int(at[1]), int(at[2])): len(value) for key, value in state.items() if (at := name.fullmatch(key))}
    phis = {key.split(".")[-2] for key in state if key.startswith("quantize.quant_resi.")}
    shared = {key.split(".")[2] for key in state if key.startswith("quantize.quant_resi.")}
    if not (blocks and phis and {"encoder.conv_in.weight", "quant_conv.weight"} <= state.keys()):
        raise ValueError(f"this is not {WHAT}: it has no {'quantize.quant_resi.*' if blocks else 'encoder.down.*'}.")
    ch = len(state["encoder.conv_in.weight"])
    levels = [blocks[level, 0] for level in sorted({level for level, _ in blocks})]
    return {
        "ch": ch,
        "ch_mult": [width // ch for width in levels],
        "num_res_blocks": sum(level == 0 for level, _ in blocks),
        "z_channels": dim,
        "share_quant_resi": len(phis) if shared == {"qresi_ls"} else 1 if shared == {"qresi"} else 0,
        "quant_conv_ks": state["quant_conv.weight"].shape[-1],
    }


def read_spec(config: Mapping[str, Any], codes: int, dim: int) -> MultiScaleSpec:
    """Sizes from published settings; `codes` and `dim` are those of the codebook's tensor, and must agree with them."""
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels", "patch_nums")
    check_settings("multi-scale VQ", config, needed, fixed={"using_znorm": False})
    check_codebook(config, vocab_size=codes, z_channels=dim)
    return MultiScaleSpec(
        *net_specs(config, (False,) * (len(config["ch_mult"]) - 1) + (True,), dim),
        codes,
        dim,
        kernel=int(config.get("quant_conv_ks", 3)),
        patch_nums=tuple(int(p) for p in config["patch_nums"]),
        phis=int(config.get("share_quant_resi", 4)),
        residual=float(config.get("quant_resi", 0.5)),
    )
