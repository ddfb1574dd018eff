"""What a family of published decoders is: how its config.json is read, and where its weights stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flashar_pl.backbones.decoder_config import MORE, DecoderConfig
from flashar_pl.layers.rope import SCALINGS, TRAINED
from flashar_pl.templates import Template

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu",
}  # fmt: skip
"""`hidden_act` of config.json, and ours."""
NUMBERS = (TRAINED, "factor", "low_freq_factor", "high_freq_factor", "truncate", *MORE)
"""What a scaled RoPE is told in config.json."""
Values = Mapping[str, Any]
"""Content of a config.json."""


@dataclass(frozen=True)
class Family:
    """Decoders with one kind of config.json."""

    model_types: tuple[str, ...]
    """`model_type` in config.json; the first is the family's name."""
    read: Callable[[Values], DecoderConfig]
    """The configuration, from the whole config.json. Raises ValueError."""
    code_names: Callable[[DecoderConfig], dict[str, str]] = lambda config: {}
    """Modules that embed and score codes beside the vocabulary: ours, theirs."""
    block_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of a block that are named otherwise than Llama's: ours, theirs whose rows follow one another in it."""
    body_names: tuple[str, str] = ("embed_tokens", "norm")
    """Their embedding and final norm."""
    image_names: tuple[str, str] = ("gen_embed_tokens", "gen_head")
    """Their embedding and head of tokens of images, where those are tensors of their own (`text_rows`)."""
    architectures: tuple[str, ...] = ()
    """First of `architectures` in config.json, where that tells the family and `model_type` does not."""
    template: Template | None = None
    """How prompts are written; None = as they are, then the token that begins an image."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Fields of config.json that are the id of a special token, where config.json has none, by its name."""
    codes_after_text: int | None = None
    """Number of codes, where their tokens follow the tokenizer's."""
    usual: Mapping[str, Any] = field(default_factory=dict)
    """Options of `DecoderConfig` that no config.json has: usual grid, guidance, pixels of a code."""
    published: Mapping[str, DecoderConfig] = field(default_factory=dict)
    """Published sizes by name."""

    @property
    def name(self) -> str:
        """What `DecoderConfig.model_type` says."""
        return self.model_types[0]

    def config(self, values: Values) -> DecoderConfig:
        """The configuration from the whole config.json, with what is usual for the family. Raises ValueError."""
        return replace(self.read(values), model_type=self.name, **self.usual)


def text_settings(values: Values, family: str, defaults: Values, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options of `DecoderConfig` that a Llama-shaped config.json gives; where it is silent, `defaults` of the family.

    needed: what it must say beside the sizes that have no usual value.

    Raises:
        ValueError: a size that is nowhere, or a feature that this decoder does not have.
    """
    found = {**defaults, **{name: value for name, value in values.items() if value is not None}}
    field = "rope_parameters" if found.get("rope_parameters") else "rope_scaling"
    rope = found.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "unknown"
    scaling = None
    if isinstance(rope, Mapping):
        found["rope_theta"] = rope.get("rope_theta") or found.get("rope_theta")
        if str(kind) in SCALINGS and (kind, rope.get("factor")) != ("linear", 1):
            trained = found.get(TRAINED) or found.get("max_position_embeddings")
            scaling = {TRAINED: trained, **{key: rope[key] for key in rope if key in NUMBERS}, "rope_type": kind}
    sizes = {
        "dim": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "rope_base": "rope_theta",
        "norm_eps": "rms_norm_eps",
    }
    if absent := [name for name in (*sizes.values(), *needed) if found.get(name) is None]:
        raise ValueError(f"config.json lacks {', '.join(absent)}; expected that of a model of type {family}.")
    activation = ACTIVATIONS.get(str(found.get("hidden_act", "silu")))
    unsupported = {
        "hidden_act": activation is None and found["hidden_act"],
        field: str(kind) not in ("default", *SCALINGS) and rope,
        "use_sliding_window": found.get("use_sliding_window"),
        "layer_types": {*(found.get("layer_types") or ())} - {"full_attention"} and found["layer_types"],
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"config.json sets {name} to {value!r}, which this decoder does not have.")
    return {
        **{ours: found[theirs] for ours, theirs in sizes.items()},
        "rope_base": float(found["rope_theta"]),
        "n_kv_head": found.get("num_key_value_heads") or found["num_attention_heads"],
        "head_dim": found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
        "qkv_bias": bool(found.get("attention_bias")),
        "output_bias": bool(found.get("attention_bias")),
        "ffn_bias": bool(found.get("mlp_bias")),
        "activation": activation,
        "rope_scaling": scaling,
    }


def code_settings(values: Values, codes: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Options of `DecoderConfig` about codes: those that config.json names, else the token ids `codes` by code.

    Raises:
        ValueError: codes that are not 0, 1, 2, ...
    """
    named = {name: values.get(name) for name in ("eol_token_id", "boi_token_id") if name in values}
    if values.get("visual_token_offset") is not None:
        number = values.get("num_visual_codes")
        return {**named, "visual_token_offset": values["visual_token_offset"], "num_visual_codes": number}
    if not codes:
        return named
    if sorted(codes) != list(range(len(codes))):
        raise ValueError(f"vocabulary_map has {len(codes)} codes from {min(codes)} to {max(codes)}; expected all.")
    ids = tuple(int(codes[code]) for code in range(len(codes)))
    if ids == tuple(range(ids[0], ids[0] + len(ids))):
        return {**named, "visual_token_offset": ids[0], "num_visual_codes": len(ids)}
    return {**named, "code_ids": ids}
