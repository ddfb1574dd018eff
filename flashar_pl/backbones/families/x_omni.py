"""X-Omni (2025): a Qwen2.5 between layers for tokens of images, which see text and leave it as it is.

Those tokens follow the text's, codes first, in an embedding and a head of their own; rows have no ends. Its diffusion
decoder is no part of this package.
"""

from __future__ import annotations

from typing import Any

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 151936, "num_mm_adap_layers": 4, "num_mm_head_layers": 4,
    "mm_vocab_size": 16448, "image_vocab_size": 16384,
}  # fmt: skip
"""What config.json leaves out where it is the published code's default."""
IMAGE_BEGIN, IMAGE, CODE_0 = "<SOM>", "<IMAGE>", "<MM-Token-0>"
USUAL: Values = {"usual_grid": (72, 72)}


def image_settings(text: dict[str, Any], image: Values) -> dict[str, Any]:
    """Options of the decoder, from those of its text part and the sizes of the rest."""
    rows, layers = text["vocab_size"], text["n_layer"]
    span = (image["num_mm_adap_layers"], layers - image["num_mm_head_layers"])
    if not 0 <= span[0] <= span[1] <= layers:
        raise ValueError(
            f"config.json sets num_mm_adap_layers and num_mm_head_layers to {span[0]} and {layers - span[1]}; expected "
            f"{layers} in all at most (num_hidden_layers)."
        )
    own = {"vocab_size": rows + image["mm_vocab_size"], "qkv_bias": True, "output_bias": False}
    return {**text, **own, "first_image_token": rows, "text_rows": rows, "text_layers": span}


def read_x_omni(values: Values) -> DecoderConfig:
    """Codes begin where the tokenizer says, else where text ends. Where it is known what begins an image, guidance
    leads away from it alone."""
    found = {**DEFAULTS, **{name: value for name, value in values.items() if value is not None}}
    text = text_settings(found, "x-omni", DEFAULTS)
    codes = {"visual_token_offset": text["vocab_size"], "num_visual_codes": found["image_vocab_size"]}
    given = {name: values[name] for name in (*codes, "boi_token_id") if name in values}
    null = () if given.get("boi_token_id") is not None else None
    settings = code_settings({**codes, **given})
    return DecoderConfig(**image_settings(text, found), **settings, unconditional_prompt=null)


def prompt(text: str, height: int, width: int) -> str:
    """The text alone."""
    return text


def image(height: int, width: int) -> str:
    """The size in codes, height first."""
    return f"{IMAGE_BEGIN}{height} {width}{IMAGE}"


QWEN: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 36, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6,
}  # fmt: skip
"""Qwen2.5-7B and 8 layers more. That its config.json says so is not verified."""
PUBLISHED = DecoderConfig(
    **image_settings(text_settings(QWEN, "x-omni", DEFAULTS), DEFAULTS), visual_token_offset=QWEN["vocab_size"],
    num_visual_codes=DEFAULTS["image_vocab_size"], model_type="x-omni", **USUAL,
)  # fmt: skip
FAMILIES = (
    Family(
        ("x-omni",),
        read_x_omni,
        body_names=("lm_embed_tokens", "mm_norm"),
        image_names=("mm_embed_tokens", "mm_head"),
        template=Template(prompt, image, (IMAGE_BEGIN, IMAGE)),
        tokens={"boi_token_id": IMAGE_BEGIN, "visual_token_offset": CODE_0},
        usual=USUAL,
        published={"x-omni-7b": PUBLISHED},
    ),
)
