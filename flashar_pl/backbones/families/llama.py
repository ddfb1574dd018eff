"""Language models whose vocabulary was extended by codes: Llama, Qwen2 (SimpleAR, X-Omni), Qwen3.

config.json does not say where codes are; `visual_token_offset` and `num_visual_codes`, and with row ends
`eol_token_id`, are added to it.
"""

from __future__ import annotations

from flashar_pl.backbones.decoder import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings

LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
"""What config.json leaves out where it is the published code's default."""


def read_llama(values: Values) -> DecoderConfig:
    """Biases only where config.json asks for them."""
    return DecoderConfig(**text_settings(values, "llama", LLAMA), **code_settings(values))


def read_qwen2(values: Values) -> DecoderConfig:
    """Queries, keys and values always have biases."""
    settings = text_settings(values, "qwen2", QWEN)
    return DecoderConfig(**{**settings, "qkv_bias": True, "output_bias": False}, **code_settings(values))


def read_qwen3(values: Values) -> DecoderConfig:
    """RMSNorm of each head's query and key; the head width stands in config.json, or is 128."""
    settings = text_settings(values, "qwen3", {**QWEN, "head_dim": 128})
    return DecoderConfig(**settings, qk_norm="rms", **code_settings(values))


FAMILIES = (Family(("llama",), read_llama), Family(("qwen2",), read_qwen2), Family(("qwen3",), read_qwen3))
