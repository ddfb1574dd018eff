"""Language models whose vocabulary was extended by codes: Llama, Qwen2 (SimpleAR), Qwen3.

config.json does not say where codes are; `visual_token_offset` and `num_visual_codes`, and with row ends
`eol_token_id`, are added to it.
"""

from __future__ import annotations

from typing import Any

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
"""What config.json leaves out where it is the published code's default."""
TRAITS: Values = {
    "embedding_multiplier": 1, "residual_multiplier": 1, "attention_multiplier": None, "logits_scaling": 1,
    "logit_scale": 1, "scale_emb": 1, "scale_depth": None, "hidden_activation": None, "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "clip_qkv": None, "sliding_window": None,
    "partial_rotary_factor": 1,
}  # fmt: skip
"""What other models with tensors of the same names set in config.json, and the value that changes nothing."""
TASK, IMAGE_BEGIN = "<|t2i|>", "<|soi|>"
"""Special tokens of SimpleAR."""
POOR = (
    f"{TASK}An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
"""What SimpleAR's authors lead away from."""
SIMPLEAR: Values = {"usual_grid": (64, 64), "cfg_scale": 6.0}


def plain_settings(values: Values, family: str, defaults: Values) -> dict[str, Any]:
    """`text_settings`; raises ValueError for `TRAITS` too, which would else be left out unsaid."""
    for name, harmless in TRAITS.items():
        if values.get(name) not in (None, harmless):
            raise ValueError(
                f"config.json sets {name} to {values[name]!r}, which a model of type {family} does not have; expected "
                "the model's own model_type, and a family for it (docs/backbones.md)."
            )
    return text_settings(values, family, defaults)


def read_llama(values: Values) -> DecoderConfig:
    """Biases only where config.json asks for them."""
    return DecoderConfig(**plain_settings(values, "llama", LLAMA), **code_settings(values))


def read_qwen2(values: Values) -> DecoderConfig:
    """Queries, keys and values always have biases."""
    settings = plain_settings({**values, "sliding_window": None}, "qwen2", QWEN)  # it has use_sliding_window
    return DecoderConfig(**{**settings, "qkv_bias": True, "output_bias": False}, **code_settings(values))


def read_qwen3(values: Values) -> DecoderConfig:
    """RMSNorm of each head's query and key; the head width stands in config.json, or is 128."""
    settings = plain_settings({**values, "sliding_window": None}, "qwen3", {**QWEN, "head_dim": 128})
    return DecoderConfig(**settings, qk_norm="rms", **code_settings(values))


def prompt(text: str, height: int, width: int) -> str:
    """As SimpleAR's authors write it."""
    return f"{TASK}A highly realistic image of {text}"


def image(height: int, width: int) -> str:
    """The size is not told."""
    return IMAGE_BEGIN


def simplear(width: int, layers: int, heads: int, ffn: int) -> DecoderConfig:
    """SimpleAR on Qwen2.5, whose sizes are published; the number of text tokens is not verified."""
    return DecoderConfig(
        dim=width, n_layer=layers, n_head=heads, n_kv_head=2, head_dim=width // heads, ffn_dim=ffn,
        vocab_size=151936 + 64000, rope_base=1e6, norm_eps=1e-6, qkv_bias=True, visual_token_offset=151936,
        num_visual_codes=64000, model_type="simplear", **SIMPLEAR,
    )  # fmt: skip


FAMILIES = (
    Family(("llama",), read_llama),
    Family(("qwen2",), read_qwen2),
    Family(("qwen3",), read_qwen3),
    Family(
        ("simplear",),
        read_qwen2,
        architectures=("SimpARForCausalLM",),
        template=Template(prompt, image, (TASK, IMAGE_BEGIN), null=POOR),
        tokens={"boi_token_id": IMAGE_BEGIN},
        codes_after_text=64000,
        usual=SIMPLEAR,
        published={"simplear-0.5b": simplear(896, 24, 14, 4864), "simplear-1.5b": simplear(1536, 28, 12, 8960)},
    ),
)
