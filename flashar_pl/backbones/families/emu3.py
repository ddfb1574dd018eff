"""Emu3 (BAAI, 2024): a Llama whose vocabulary ends with the codes; every row of an image ends with a token."""

from __future__ import annotations

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

DEFAULTS = {
    "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
}  # fmt: skip
CODE, ROW_END, IMAGE_BEGIN = "<|visual token ", "<|extra_200|>", "<|image start|>"
"""Names in `vocabulary_map`; that of code 12 is <|visual token 000012|>."""
BEGIN, IMAGE = "<|extra_203|>", "<|image token|>"
USUAL: Values = {"usual_grid": (90, 90), "cfg_scale": 3.0, "code_pixels": 8}


def read_emu3(values: Values) -> DecoderConfig:
    """Codes, row end and image begin from `vocabulary_map`, unless config.json names their ids."""
    names = values.get("vocabulary_map") or {}
    codes = {int(name[len(CODE) : -2]): token for name, token in names.items() if name.startswith(CODE)}
    text = text_settings(values.get("text_config") or {}, "emu3", DEFAULTS)
    found = {"eol_token_id": names.get(ROW_END), "boi_token_id": names.get(IMAGE_BEGIN)}
    return DecoderConfig(**text, **{**found, **code_settings(values, codes)})


def prompt(text: str, height: int, width: int) -> str:
    """As Emu3's processor writes it."""
    return f"{BEGIN}{text}"


def image(height: int, width: int) -> str:
    """The size in codes."""
    return f"{IMAGE_BEGIN}{height}*{width}{IMAGE}"


FAMILIES = (
    Family(
        ("emu3",),
        read_emu3,
        template=Template(prompt, image, (BEGIN, IMAGE_BEGIN, IMAGE)),
        usual=USUAL,
        published={
            "emu3-8b": DecoderConfig(
                **text_settings({}, "emu3", DEFAULTS), visual_token_offset=184622 - 32768,
                num_visual_codes=32768, eol_token_id=151846, boi_token_id=151852, unconditional_prompt=(151849,),
                model_type="emu3", text_prefix="model.text_model.", **USUAL,
            ),
        },
    ),
)  # fmt: skip
