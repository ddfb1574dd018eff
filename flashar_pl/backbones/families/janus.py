"""Janus-Pro (DeepSeek, 2025): a Llama; codes of VQ-16 have vectors of their own, and an MLP on both sides."""

from __future__ import annotations

from flashar_pl.backbones.decoder import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.backbones.families.llama import LLAMA

VQ = {"embed_dim": 8, "num_embeddings": 16384, "num_hidden_layers": 2, "projection_dim": 2048, "hidden_act": "gelu"}
"""Defaults of `vq_config`."""


def code_names(config: DecoderConfig) -> dict[str, str]:
    """Names of the modules around codes."""
    return {
        "code_mlp.vectors": "generation_embeddings",
        "code_mlp.layers.0": "generation_aligner.fc1",
        **{f"code_mlp.layers.{i}": f"generation_aligner.hidden_layers.{i - 1}" for i in range(1, config.code_layers)},
        "norm.projection": "generation_head.proj_out",
        "head": "generation_head.vision_head",
    }


def read_janus(values: Values) -> DecoderConfig:
    """Sizes of the MLPs from `vq_config`."""
    text = text_settings(values.get("text_config") or {}, "janus", LLAMA)
    vq = {**VQ, **(values.get("vq_config") or {})}
    if vq["hidden_act"] != "gelu":
        raise ValueError(f"config.json sets hidden_act of vq_config to {vq['hidden_act']!r}; expected 'gelu'.")
    if vq["projection_dim"] != text["dim"]:
        raise ValueError(
            f"projection_dim of vq_config is {vq['projection_dim']}; expected hidden_size, which is {text['dim']}."
        )
    return DecoderConfig(
        **text,
        **code_settings({name: values[name] for name in ("boi_token_id",) if name in values}),
        heads="visual",
        num_visual_codes=vq["num_embeddings"],
        code_width=vq["embed_dim"],
        code_layers=vq["num_hidden_layers"],
        code_hidden=vq["projection_dim"],
    )


FAMILIES = (Family(("janus",), read_janus, code_names),)
