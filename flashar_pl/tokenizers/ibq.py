"""Emu3.5's image tokenizer (IBQ): 131,072 codes, 16 pixels per code.

Shapes: B images of h x w pixels, f pixels per code, H = h / f, W = w / f.
Source: Shi et al. 2024 (index backpropagation quantisation); the files of BAAI/Emu3.5-VisionTokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashar_pl.renames import official_state_dict
from flashar_pl.text_files import naming
from flashar_pl.tokenizers.conv_tokenizer import (
    ConvTokenizer,
    TokenizerSpec,
    check_codebook,
    check_settings,
    codebook_shape,
    load_strict,
    net_specs,
)
from flashar_pl.tokenizers.convnet import NetSpec, taming_name
from flashar_pl.tokenizers.files import read_settings, read_weights, require_file

ADVICE = (
    "Give the directory of BAAI/Emu3.5-VisionTokenizer from huggingface.co (model.safetensors with config.json, or "
    "model.ckpt with config.yaml), or one of the two weight files; nothing is downloaded for you."
)
IBQ_SPEC = TokenizerSpec(
    NetSpec(256, (256, 256, 512, 512, 1024), blocks=4, attention=(False,) * 4 + (True,), latent=256),
    NetSpec(1024, (256, 256, 512, 512, 1024), blocks=5, attention=(False,) * 4 + (True,), latent=256),
    codes=131072,
    dim=256,
)
"""The published sizes."""
PAIRS = (("model.safetensors", "config.json"), ("model.ckpt", "config.yaml"))
"""The two published formats: weights and settings."""


class IBQ(ConvTokenizer):
    """A code is the argmax over the codebook of the dot product with the latent: no normalisation, not the nearest."""

    unit_norm = False

    settings: str | None = None
    """Their file, where it is not the one beside the weights."""

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], ddconfig: Mapping[str, Any]) -> IBQ:
        """Loads a state dict in the published layout, bare or under "ema" (wins) or "state_dict"; copied.

        ddconfig: the published settings, flat (config.json) or with a "ddconfig" entry somewhere (config.yaml).
        The codebook's size is read from its tensor. Raises ValueError where settings and tensors disagree, and for
        any tensor that is missing, left over or of another shape.
        """
        state = official_state_dict(state_dict)[0]
        spec = read_ibq_settings(ddconfig, *codebook_shape(state, "an Emu3.5 IBQ state dict"))
        what = f"the Emu3.5 IBQ state dict (settings: {spec})"
        return load_strict(lambda: cls(spec), state, what)

    @classmethod
    def from_files(
        cls, weights: str | Path | None = None, *, settings: str | Path | None = None, decode_dtype: str = "float32"
    ) -> IBQ:
        """Loads either published format from its directory or its weights file.

        settings: the file with the settings; None takes the one published beside the weights.
        """
        file = _weights_file(weights)
        names = dict(PAIRS)
        beside = file.with_name(names.get(file.name, "config.json" if file.suffix == ".safetensors" else "config.yaml"))
        config = require_file(settings or beside, "settings file of the tokenizer", ADVICE)
        published = read_settings(config)  # before gigabytes of weights
        with naming(file):
            model = cls.from_official(read_weights(file), published)
        model.opened(weights, decode_dtype)
        model.settings = None if settings is None else str(settings)
        return model

    def official_name(self, name: str) -> str:
        return taming_name(name, len(self.spec.decoder.widths))

    def config(self) -> dict[str, Any]:
        stored = {"weights": self.weights, "settings": self.settings, "decode_dtype": self.decode_dtype}
        return {"kind": "ibq", **stored}


def read_ibq_settings(config: Mapping[str, Any], codes: int, dim: int) -> TokenizerSpec:
    """Sizes from published settings; `codes` and `dim` are those of the codebook's tensor, and must agree with them.

    Level l stands at resolution / 2^l and has attention where that number is in attn_resolutions. The resolution is
    no image size: images may have any sides that are multiples of f.
    """
    outer, net = _find_ddconfig(config) or (config, config)
    needed = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
    check_settings("tokenizer", net, needed, fixed={"in_channels": 3, "out_ch": 3, "double_z": False})
    check_codebook(outer, codebook_size=codes, n_embed=codes, embed_dim=dim)
    try:
        levels = range(len(net["ch_mult"]))
        attention = tuple(int(net["resolution"]) // 2**level in net["attn_resolutions"] for level in levels)
        return TokenizerSpec(*net_specs(net, attention, int(net["z_channels"])), codes, dim)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the tokenizer's settings cannot be used: {error}.") from error


def _find_ddconfig(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first mapping, outermost first, that has a "ddconfig" entry, and that entry."""
    if isinstance(config.get("ddconfig"), Mapping):
        return config, config["ddconfig"]
    for value in config.values():
        if isinstance(value, Mapping) and (found := _find_ddconfig(value)):
            return found
    return None


def _weights_file(weights: str | Path | None) -> Path:
    if weights is not None and (directory := Path(weights).expanduser()).is_dir():
        for name, _ in PAIRS:
            if (directory / name).is_file():
                return directory / name
        raise ValueError(f"{directory} has neither {PAIRS[0][0]} nor {PAIRS[1][0]}. {ADVICE}")
    return require_file(weights, "tokenizer weights file", ADVICE)
