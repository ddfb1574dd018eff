"""LlamaGen's VQ tokenizers: VQ-16 and VQ-8.

Shapes: B images of h x w pixels, f pixels per code, H = h / f, W = w / f.
Source: Sun et al. 2024 (LlamaGen), section 2.1; the files vq_ds16_c2i.pt, vq_ds16_t2i.pt and vq_ds8_c2i.pt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.renames import official_state_dict
from flashar_pl.text_files import naming
from flashar_pl.tokenizers.conv_tokenizer import ConvTokenizer, TokenizerSpec, codebook_shape, load_strict
from flashar_pl.tokenizers.convnet import NetSpec, read_spec
from flashar_pl.tokenizers.files import read_weights, require_file

USED = "quantize.codebook_used"
WHAT = "a LlamaGen VQ state dict"
ADVICE = (
    "Give the path of LlamaGen's vq_ds16_c2i.pt (kind vq16) or vq_ds8_c2i.pt (kind vq8), from huggingface.co/"
    "FoundationVision/LlamaGen; nothing is downloaded for you."
)


def _preset(widths: tuple[int, ...]) -> TokenizerSpec:
    encoder = NetSpec(128, widths, blocks=2, attention=(False,) * (len(widths) - 1) + (True,), latent=256)
    return TokenizerSpec(encoder, replace(encoder, stem=widths[-1], blocks=3), codes=16384, dim=8)


VQ_PRESETS: dict[str, TokenizerSpec] = {
    "vq16": _preset((128, 128, 256, 256, 512)),
    "vq8": _preset((128, 256, 256, 512)),
}
"""The published sizes: channel multipliers 1, 1, 2, 2, 4 (f = 16) and 1, 2, 2, 4 (f = 8) of 128 channels."""


class VQ16(ConvTokenizer):
    """LlamaGen's VQ tokenizer of any size; VQ-8 is the same network with one level less.

    Latents and code vectors are compared at unit length (the published `codebook_l2_norm`).
    """

    unit_norm = True

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> VQ16:
        """Loads a state dict in the published layout, bare or under "ema" (wins), "model" or "state_dict"; copied.

        Every size is read from the tensors: f is 2^(levels - 1). The buffer "quantize.codebook_used" may be missing.
        Raises ValueError for any tensor that is missing, left over or of another shape.
        """
        state = official_state_dict(state_dict)[0]
        used = state.get(USED)
        encoder, decoder = read_spec(state, "encoder"), read_spec(state, "decoder")
        spec = TokenizerSpec(encoder, decoder, *codebook_shape(state, WHAT))

        def build() -> VQ16:
            model = cls(spec)
            if used is not None:
                model.quantize.register_buffer("codebook_used", torch.empty(used.shape))
            return model

        return load_strict(build, state, "the LlamaGen VQ state dict")

    @classmethod
    def from_file(cls, weights: str | Path | None = None, *, kind: str = "vq16", decode_dtype: str = "float32") -> VQ16:
        """Loads a published file. Raises ValueError where it is missing, or is the other one of VQ-16 and VQ-8."""
        file = require_file(weights, "VQ weights file", ADVICE)
        with naming(file):
            model = cls.from_official(read_weights(file))
        for other, spec in VQ_PRESETS.items():
            if model.spec == spec and other != kind:
                raise ValueError(f"{file} holds {other} ({model.downsample} pixels per code), not {kind}: use {other}.")
        model.opened(weights, decode_dtype)
        return model

    def config(self) -> dict[str, Any]:
        kind = "vq8" if self.downsample == 8 else "vq16"
        return {"kind": kind, "weights": self.weights, "decode_dtype": self.decode_dtype}

    def from_uint8(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - 0.5) / 0.5  # torchvision's ToTensor and Normalize(0.5, 0.5)

    def to_uint8(self, images: Tensor) -> Tensor:
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
