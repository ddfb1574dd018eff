"""Janus-Pro (DeepSeek, 2025): a Llama; codes of VQ-16 have vectors of their own, and an MLP on both sides."""

from __future__ import annotations

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.backbones.families.llama import LLAMA
from flashar_pl.templates import Template

VQ = {"embed_dim": 8, "num_embeddings": 16384, "num_hidden_layers": 2, "projection_dim": 2048, "hidden_act": "gelu"}
"""Defaults of `vq_config`."""
START, IMAGE_BEGIN = "<｜begin▁of▁sentence｜>", "<begin_of_image>"
USUAL: Values = {"usual_grid": (24, 24), "cfg_scale": 5.0}


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
        null_token_id=(values.get("text_config") or {}).get("pad_token_id") if "boi_token_id" in values else None,
        heads="visual",
        num_visual_codes=vq["num_embeddings"],
        code_width=vq["embed_dim"],
        code_layers=vq["num_hidden_layers"],
        code_hidden=vq["projection_dim"],
    )


def prompt(text: str, height: int, width: int) -> str:
    """The conversation that Janus-Pro's authors draw from."""
    return f"{START}<|User|>: {text}\n\n<|Assistant|>:"


def image(height: int, width: int) -> str:
    """The size is not told: it is always the same."""
    return IMAGE_BEGIN


def size(width: int, layers: int, heads: int, ffn: int) -> DecoderConfig:
    """A published model."""
    return DecoderConfig(
        dim=width, n_layer=layers, n_head=heads, n_kv_head=heads, head_dim=128, ffn_dim=ffn, vocab_size=102400,
        rope_base=1e4, norm_eps=1e-6, heads="visual", num_visual_codes=16384, code_width=8, code_hidden=width,
        boi_token_id=100016, null_token_id=100002, model_type="janus", text_prefix="model.language_model.", **USUAL,
    )  # fmt: skip


FAMILIES = (
    Family(
        ("janus",),
        read_janus,
        code_names,
        template=Template(prompt, image, (START, IMAGE_BEGIN)),
        tokens={"boi_token_id": IMAGE_BEGIN},
        usual=USUAL,
        published={"janus-pro-1b": size(2048, 24, 16, 5632), "janus-pro-7b": size(4096, 30, 32, 11008)},
    ),
)
