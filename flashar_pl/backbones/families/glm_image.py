"""GLM-Image (Zhipu, 2026): a GLM-4 with sandwich norms and M-RoPE that draws a small preview, then the image.

Codes are the first tokens of the vocabulary, and its head scores them and few others. Each stands for 32 x 32 pixels;
the diffusion model that makes an image of them is no part of this package.
"""

from __future__ import annotations

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

DEFAULTS = {
    "vocab_size": 168064, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
SECTIONS = (8, 12, 12)
"""`mrope_section` where config.json is silent."""
CODES, HEAD, IMAGE_BEGIN_ID = 16384, 16512, 16384
"""Defaults of `num_embeddings`, `vision_vocab_size` and `image_start_token_id`."""
PREVIEW_SIDE = 16
GRID_BEGIN, GRID_END, IMAGE_BEGIN = "<sop>", "<eop>", "<|dit_token_16384|>"
USUAL: Values = {"usual_grid": (32, 32), "code_pixels": 32, "preview_side": PREVIEW_SIDE}
BLOCK_NAMES = {
    "attention_post_norm": ("post_self_attn_layernorm",),
    "ffn_post_norm": ("post_mlp_layernorm",),
    "feed_forward.w13": ("mlp.gate_up_proj",),
}


def read_glm_image(values: Values) -> DecoderConfig:
    """Sizes from `text_config`, the number of codes from `vq_config`."""
    text, vq = ({**(values.get(name) or {})} for name in ("text_config", "vq_config"))
    settings = text_settings(text, "glm_image", DEFAULTS)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    codes = {"visual_token_offset": 0, "num_visual_codes": vq.get("num_embeddings") or CODES}
    begin = values.get("image_start_token_id")
    own = {"boi_token_id": IMAGE_BEGIN_ID if begin is None else begin}
    return DecoderConfig(
        **{**settings, "qkv_bias": bool(text.get("attention_bias", True)), "output_bias": False, "ffn_bias": False},
        **{**own, **code_settings({**codes, **{name: value for name, value in values.items() if value is not None}})},
        norm_place="both",
        head_size=text.get("vision_vocab_size") or HEAD,
        rope_width=int(settings["head_dim"] * rope.get("partial_rotary_factor", 1.0)),
        rope_sections=tuple(rope.get("mrope_section") or SECTIONS),
    )


def prompt(text: str, height: int, width: int) -> str:
    """The text alone."""
    return text


def image(height: int, width: int) -> str:
    """The size of the image, and of its preview."""
    preview = PUBLISHED.preview(height, width)
    assert preview is not None
    return "".join(f"{GRID_BEGIN}{h} {w}{GRID_END}" for h, w in ((height, width), preview)) + IMAGE_BEGIN


PUBLISHED = DecoderConfig(
    **{**text_settings({}, "glm_image", DEFAULTS), "qkv_bias": True}, norm_place="both", rope_width=64,
    rope_sections=SECTIONS, head_size=HEAD, visual_token_offset=0, num_visual_codes=CODES, boi_token_id=IMAGE_BEGIN_ID,
    model_type="glm_image", text_prefix="model.language_model.", **USUAL,
)  # fmt: skip
FAMILIES = (
    Family(
        ("glm_image",),
        read_glm_image,
        block_names=BLOCK_NAMES,
        template=Template(prompt, image, (GRID_BEGIN, GRID_END, IMAGE_BEGIN)),
        usual=USUAL,
        published={"glm-image-9b": PUBLISHED},
    ),
)
