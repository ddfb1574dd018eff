"""A tokenizer made of encoder, codebook and decoder: what the LlamaGen VQ, the Emu3.5 IBQ and VAR's VQ have in common.

Shapes: B images of h x w pixels, f pixels per code, H = h / f, W = w / f, N codes of dimension D, Z latent channels,
M = B * H * W vectors to look up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.numerics import DTYPES, strict_float32
from flashar_pl.options import PixelDtype
from flashar_pl.renames import Rename, StateDict, build_filled, on_meta, split_rows
from flashar_pl.tokenizers.base import Tokenizer
from flashar_pl.tokenizers.convnet import ConvNet, NetSpec

LOOKUP_ELEMENTS = 2**24
"""Largest number of scores held at once by `best_codes` (64 MiB of float32)."""

DECODE_DTYPES = ("float32", "bfloat16")
BFLOAT16_CAPABILITY = (8, 0)
"""First CUDA compute capability that multiplies bfloat16."""

T = TypeVar("T", bound="ConvTokenizer")


@dataclass(frozen=True)
class TokenizerSpec:
    """All sizes of a `ConvTokenizer`."""

    encoder: NetSpec
    decoder: NetSpec
    codes: int
    """N."""
    dim: int
    """D."""
    kernel: int = 1
    """Side of the two convolutions beside the quantiser."""


class Codebook(nn.Module):
    """The table of code vectors; `codebook_used` is a training counter that some published files carry along."""

    codebook_used: Tensor | None

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        self.register_buffer("codebook_used", None)


class ConvTokenizer(Tokenizer):
    """Encoder, convolution, codebook, convolution, decoder.

    Encoding always runs in float32 (no autocast, no TF32): lower precision flips codes. Decoding runs in
    `decode_dtype`, with a copy of the decoder where that is bfloat16. Weights are float32 and frozen; `.to(device)`
    moves them.
    """

    unit_norm: bool
    """Are latents and code vectors scaled to unit length before they are compared and before decoding?"""

    weights: str | None = None
    """The file they came from."""

    def __init__(self, spec: TokenizerSpec) -> None:
        """Random weights; `from_official` and the file readers of the subclasses load published ones."""
        super().__init__()
        self.spec = spec
        self.vocabulary = spec.codes
        self.downsample = spec.encoder.downsample
        self.encoder = ConvNet(spec.encoder, decodes=False)
        self.decoder = ConvNet(spec.decoder, decodes=True)
        self.quantize = self.make_codebook()
        self.quant_conv = nn.Conv2d(spec.encoder.latent, spec.dim, spec.kernel, padding=spec.kernel // 2)
        self.post_quant_conv = nn.Conv2d(spec.dim, spec.decoder.latent, spec.kernel, padding=spec.kernel // 2)
        self._rounded: list[nn.Module] = []  # no part of the module: not in its state dict
        self.requires_grad_(False)
        self.eval()

    def decode_in(self, dtype: PixelDtype | None) -> None:
        device = self.quantize.embedding.weight.device
        if dtype is not None:
            self.decode_dtype = str(DTYPES[dtype]).removeprefix("torch.")
        elif device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
            self.decode_dtype = "bfloat16"

    def opened(self, weights: str | Path | None, decode_dtype: str) -> None:
        """Note what a config asked for. Raises ValueError for another dtype than those of `decode_dtype`."""
        if decode_dtype not in DECODE_DTYPES:
            raise ValueError(f"decode_dtype is {decode_dtype!r}; expected one of {', '.join(DECODE_DTYPES)}.")
        self.weights, self.decode_dtype = str(weights), decode_dtype

    def make_codebook(self) -> Codebook:
        """The code vectors, random."""
        return Codebook(self.spec.codes, self.spec.dim)

    def from_uint8(self, images: Tensor) -> Tensor:
        """uint8 to float32 in [-1, 1], as in the published training code."""
        return images.float() / 127.5 - 1

    def to_uint8(self, images: Tensor) -> Tensor:
        """Values around [-1, 1] to uint8, as in the published sampling code (truncated, not rounded)."""
        return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)

    def official_name(self, name: str) -> str:
        """The published name of one of our parameters."""
        return name

    def renames(self) -> list[Rename]:
        """The published name of every tensor."""
        return [Rename(name, (self.official_name(name),)) for name in self.state_dict()]

    def to_official(self) -> dict[str, Tensor]:
        """The state dict in the published layout, bit for bit the one that was loaded (float32)."""
        return split_rows(self.state_dict(), self.renames())

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=False)
        return self.encode_float(self.from_uint8(images))

    def decode(self, codes: Tensor) -> Tensor:
        return self.to_uint8(self.decode_float(codes))

    @torch.no_grad()
    def encode_float(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=True)
        self.check_weights()
        with strict_float32(images.device.type):
            return self.look_up(self.quant_conv(self.encoder(images.float())))  # (B, H, W)

    @torch.no_grad()
    def decode_float(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        self.check_weights()
        with strict_float32(codes.device.type):
            return self.decode_latents(self.latents(codes))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, h, w) float32 of latents (B, D, H, W), in `decode_dtype`."""
        if self.decode_dtype != "float32":
            x = latents.to(torch.bfloat16, memory_format=torch.channels_last)
            return self._bfloat16(latents.device)(x).to(torch.float32, memory_format=torch.contiguous_format)
        with strict_float32(latents.device.type):
            return self.decoder(self.post_quant_conv(latents))

    def _bfloat16(self, device: torch.device) -> nn.Module:
        """The decoder's copy in bfloat16, channels innermost; made at its first use on a device."""
        if not self._rounded or next(self._rounded[0].parameters()).device != device:
            made: Any = copy.deepcopy(nn.Sequential(self.post_quant_conv, self.decoder))
            self._rounded = [made.to(torch.bfloat16, memory_format=torch.channels_last)]  # missing in torch's types
        return self._rounded[0]

    def look_up(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of latents (B, D, H, W)."""
        rows = z.movedim(1, -1).flatten(0, 2)  # (M, D)
        codes = best_codes(self._unit(rows), self._unit(self.quantize.embedding.weight))  # (M,)
        return codes.view(z.shape[0], *z.shape[2:])

    def latents(self, codes: Tensor) -> Tensor:
        """What the decoder gets for codes (B, H, W): (B, D, H, W)."""
        return self._unit(F.embedding(codes, self.quantize.embedding.weight)).movedim(-1, 1).contiguous()

    def _unit(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.unit_norm else rows

    def check_weights(self) -> None:
        """Raises ValueError unless the weights are float32."""
        if self.quantize.embedding.weight.dtype != torch.float32:
            raise ValueError(
                f"the tokenizer's weights are {self.quantize.embedding.weight.dtype}; they must stay float32, because "
                "codes flip in lower precision. Use .to(device) without a dtype; decode_dtype='bfloat16' speeds up "
                "decoding."
            )


def best_codes(rows: Tensor, table: Tensor) -> Tensor:
    """argmax_n <rows[m], table[n]> for every m, the first one where several are equal.

    rows (M, D), table (N, D), both float32; returns (M,) int64. Between unit vectors this is the nearest code.
    At most `LOOKUP_ELEMENTS` scores exist at a time (never fewer than one row of N).
    """
    chunk = max(1, LOOKUP_ELEMENTS // table.shape[0])
    columns = table.t()  # (D, N)
    return torch.cat([(part @ columns).argmax(dim=1) for part in rows.split(chunk)])


def load_strict(build: Callable[[], T], state: Mapping[str, Tensor], what: str) -> T:
    """`build()` with the weights of `state`, under their published names, copied to float32.

    Raises ValueError naming the tensors that are missing, left over or of another shape.
    """
    model = build_filled(build, StateDict(state, what), on_meta(build).renames(), dtype=torch.float32)
    return model.requires_grad_(False)


def codebook_shape(state: Mapping[str, Tensor], what: str) -> tuple[int, int]:
    """(N, D) from the code vectors of a state dict; ValueError where there are none."""
    table = state.get("quantize.embedding.weight")
    if not isinstance(table, Tensor) or table.ndim != 2:
        raise ValueError(f"this is not {what}: it has no matrix 'quantize.embedding.weight'.")
    return table.shape[0], table.shape[1]


def check_settings(what: str, config: Mapping[str, Any], needed: Iterable[str], fixed: Mapping[str, Any]) -> None:
    """ValueError where published settings lack one that is needed, or have another value than the one there is."""
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"the {what}'s settings lack {', '.join(missing)}; they have {', '.join(map(str, config))}.")
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"the {what}'s settings have {key} = {config[key]!r}; this reader knows only {value}.")


def check_codebook(config: Mapping[str, Any], **sizes: int) -> None:
    """ValueError where published settings say another size than the codebook's tensor has."""
    for key, found in sizes.items():
        if config.get(key, found) != found:
            raise ValueError(f"the settings say {key} = {config[key]}, but the codebook's tensor says {found}.")


def net_specs(config: Mapping[str, Any], attention: tuple[bool, ...], latent: int) -> tuple[NetSpec, NetSpec]:
    """Encoder and decoder, which has a block more a level, of published settings."""
    widths = tuple(int(config["ch"]) * int(multiplier) for multiplier in config["ch_mult"])
    encoder = NetSpec(int(config["ch"]), widths, int(config["num_res_blocks"]), attention, latent)
    return encoder, replace(encoder, stem=widths[-1], blocks=encoder.blocks + 1)
