"""MammothModa2-Preview (ByteDance, 2025): a Qwen2.5 whose layers have an MLP of their own for tokens of images.

Those tokens follow the text's, in an embedding and a head of their own: the row end first, codes some tokens later.
Drawn tokens stand at positions that count on, on all axes of its M-RoPE. Its diffusion decoder is no part of this
package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

DEFAULTS = {"vocab_size": 152064, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_attention_heads": 64}
"""What config.json leaves out where it is the published code's default."""
IMAGE_TOKENS, CODES_BEGIN, CODES = 32800, 8, 16384
"""Number of tokens of images; of those, the first code, and how many codes there are (`t2i_generation_config.json`)."""
START, END, IMAGE_BEGIN, IMAGE = "<|im_start|>", "<|im_end|>", "<|image start|>", "<|image token|>"
USUAL: Values = {"usual_grid": (64, 64), "cfg_scale": 6.0}


def image_layers(kind: str) -> tuple[int, int] | None:
    """Layers of a `moe_type` such as ffn-14:28; None = all. ValueError for experts in attention, or none."""
    name, _, span = kind.partition("-")
    if name != "ffn":
        raise ValueError(f"config.json sets moe_type to {kind!r}; expected ffn, or ffn-BEGIN:END.")
    if not span:
        return None
    begin, end = (int(word) for word in span.split(":"))
    return begin, end


def read_mammothmoda2(values: Values) -> DecoderConfig:
    """From `llm_config`, or the same without what is around it."""
    model: Any = values.get("llm_config") or values
    text: dict[str, Any] = dict(model.get("text_config") or model)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) in ("default", "mrope"):  # sections of equal positions
        text |= {"rope_scaling": None, "rope_parameters": None}
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    settings = text_settings(text, "mammothmoda2", DEFAULTS)
    own = text.get("extra_gen_vocab", True)
    rows, count = settings["vocab_size"], text.get("gen_vocab_size") or IMAGE_TOKENS
    first = text.get("gen_vocab_start_index")
    first = (rows if own else rows - count) if first is None else first
    if own and first != rows:
        raise ValueError(f"gen_vocab_start_index is {first}; expected {rows}, where tokens of text end.")
    layers = image_layers(text.get("moe_type") or "ffn")
    codes = {"eol_token_id": first, "visual_token_offset": first + CODES_BEGIN, "num_visual_codes": CODES}
    given = {name: values[name] for name in (*codes, "boi_token_id") if name in values}
    return DecoderConfig(
        **{**settings, "vocab_size": rows + count * own, "qkv_bias": True, "output_bias": False},
        **code_settings({**codes, **given}),
        first_image_token=first,
        text_rows=rows if own else None,
        image_layers=None if layers is None else (layers[0], min(layers[1], settings["n_layer"])),
    )


def prompt(text: str, height: int, width: int) -> str:
    """The conversation that its authors draw from."""
    system = f"{START}system\nYou are a helpful image generator.{END}\n"
    return f"{system}{START}user\n{text}{END}\n{START}assistant\n"


def image(height: int, width: int) -> str:
    """The size in codes, width first."""
    return f"{IMAGE_BEGIN}{width}*{height}{IMAGE}"


PREVIEW = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "moe_type": "ffn-14:28", "rms_norm_eps": 1e-6, "vocab_size": 152064,
}  # fmt: skip
"""Qwen2.5-VL-7B with MLPs of images in its upper half. That its config.json says so is not verified."""
PUBLISHED = replace(read_mammothmoda2(PREVIEW), model_type="mammothmoda2", **USUAL)
FAMILIES = (
    Family(
        ("mammothmoda2", "mammothmoda2_qwen2_5_vl"),
        read_mammothmoda2,
        template=Template(prompt, image, (START, END, IMAGE_BEGIN, IMAGE), null=f"{START}assistant\n"),
        tokens={"boi_token_id": IMAGE_BEGIN},
        usual=USUAL,
        published={"mammothmoda2-preview": PUBLISHED},
    ),
)
