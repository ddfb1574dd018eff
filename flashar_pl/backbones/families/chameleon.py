"""Chameleon (Meta, 2024), Anole and Lumina-mGPT: codes are tokens in any order; each head's query and key are normed.

Lumina-mGPT ends rows with a token; its id is given as `eol_token_id`.
"""

from __future__ import annotations

from flashar_pl.backbones.decoder import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings

DEFAULTS = {
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
CODE, IMAGE_BEGIN = "IMGIMG", "<racm3:break>"
"""Names in `vocabulary_map`; that of code 12 is IMGIMGBCZ: its digits as letters A to J, then Z."""
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def read_chameleon(values: Values) -> DecoderConfig:
    """Codes from `vocabulary_map`, unless config.json has `visual_token_offset`; `swin_norm` puts norms afterwards."""
    names = values.get("vocabulary_map") or {}
    codes = {int(name[len(CODE) : -1].translate(DIGITS)): id for name, id in names.items() if name.startswith(CODE)}
    return DecoderConfig(
        **text_settings(values, "chameleon", DEFAULTS),
        **{"boi_token_id": names.get(IMAGE_BEGIN), **code_settings(values, codes)},
        qk_norm="layer",
        norm_place="after" if values.get("swin_norm") else "before",
    )


FAMILIES = (Family(("chameleon",), read_chameleon),)
