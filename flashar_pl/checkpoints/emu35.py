"""Official Emu3.5 weights in and out: one table of names, read in both directions, strict both ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.emu35 import Emu35, Emu35Config, Heads
from flashar_pl.checkpoints.description import check_layers
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory
from flashar_pl.renames import Rename, StateDict, TensorSource, build_filled, split_rows
from flashar_pl.text_files import read_json

HEAD = "lm_head.weight"
MODEL_TYPE = "emu3_flashar"
"""`model_type` in the config.json of the FlashAR authors' checkpoints."""


def block_renames(config: Emu35Config, ours: str, official: str) -> Iterator[Rename]:
    """Names of one block under the given prefixes, with the rows of each official tensor."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    table: dict[str, dict[str, int] | tuple[str, ...]] = {
        "attention_norm": ("input_layernorm",),
        "attention.wqkv": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "attention.wo": ("self_attn.o_proj",),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
        "ffn_norm": ("post_attention_layernorm",),
        "feed_forward.w13": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.w2": ("mlp.down_proj",),
    }
    for key, pieces in table.items():
        sizes = tuple(pieces.values()) if isinstance(pieces, dict) else None
        yield Rename(f"{ours}{key}.weight", tuple(f"{official}{name}.weight" for name in pieces), sizes)


def body_renames(config: Emu35Config, ours: str, official: str) -> Iterator[Rename]:
    """Names of embedding, blocks and final norm under the given prefixes."""
    yield Rename(f"{ours}embedding.weight", (f"{official}embed_tokens.weight",))
    for i in range(config.n_layer):
        yield from block_renames(config, f"{ours}blocks.{i}.", f"{official}layers.{i}.")
    yield Rename(f"{ours}norm.weight", (f"{official}norm.weight",))


def head_rename(config: Emu35Config, ours: str, official: str) -> Rename:
    """Name of a head; heads="visual" skips the text rows."""
    return Rename(ours, (official,), skip=config.vocab_size - config.head_rows)


def backbone_renames(config: Emu35Config, ours: str = "", head: str = "head.weight") -> list[Rename]:
    """Names of a whole official checkpoint; `ours` is the prefix of our names, `head` our name of the head."""
    return [*body_renames(config, ours, "model."), head_rename(config, head, HEAD)]


def is_table(key: str) -> bool:
    """Whether an official entry is a RoPE table that some saved files carry, and no weight."""
    return key.endswith("rotary_emb.inv_freq")


def parse_config(values: dict[str, Any], heads: Heads, head_dim: int | None = None) -> Emu35Config:
    """Our config from a HF config.json. head_dim: width found in the weights, used where config.json has none.

    Raises:
        ValueError: a needed field is missing, or a feature that Emu3.5 does not have is switched on.
    """
    outer, values = values, values.get("backbone_config", values)
    if not isinstance(values, dict):
        raise ValueError("config.json holds no settings of a model; expected an Emu3.5 config.json.")
    rope = values.get("rope_parameters") or {}
    found = {**values, "rope_theta": values.get("rope_theta", rope.get("rope_theta"))}
    found["head_dim"] = values.get("head_dim") or head_dim
    needed = {
        "dim": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "rope_base": "rope_theta",
        "norm_eps": "rms_norm_eps",
    }
    absent = [name for name in needed.values() if found.get(name) is None]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; expected an Emu3.5 config.json.")
    unsupported = {
        "rope_scaling": _changes(values.get("rope_scaling")) or _changes(rope),
        "tie_word_embeddings": values.get("tie_word_embeddings"),
        "hidden_act": values.get("hidden_act", "silu") != "silu" and values["hidden_act"],
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"config.json sets {name} to {value!r}, which Emu3.5 does not use.")
    return Emu35Config(
        **{ours: found[name] for ours, name in needed.items()},
        visual_token_offset=_visual_offset(outer, values),
        eol_token_id=values.get("eol_token_id"),
        boi_token_id=values.get("boi_token_id"),
        heads=heads,
    )


def _changes(rope: Any) -> Any:
    """A block about rotary positions, if it changes them; the default kind and a factor of 1 do not."""
    if not rope:
        return None
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "unknown"
    return None if kind == "default" or (kind == "linear" and rope.get("factor") == 1) else rope


def _visual_offset(*configs: dict[str, Any]) -> int | None:
    for name, before in (("visual_token_offset", 0), ("eoi_token_id", 1)):
        for values in configs:
            if values.get(name) is not None:
                return int(values[name]) + before
    return None


def found_head_dim(source: TensorSource, prefix: str = "model.") -> int | None:
    """Head width in the weights; None if the key that tells it is missing."""
    key = f"{prefix}layers.0.self_attn.q_norm.weight"
    return source.shape(key)[0] if key in set(source.keys()) else None


def _check_layers(values: dict[str, Any], source: TensorSource) -> None:
    check_layers(values.get("backbone_config", values), "num_hidden_layers", len(list(source.keys())))


class OfficialDirectory(SafetensorsDirectory):
    """A published directory, of the base model or of its FlashAR: config.json and safetensors files."""

    def __init__(self, directory: str | Path) -> None:
        self.values = read_json(Path(directory) / "config.json")
        self.released = self.values.get("model_type") == MODEL_TYPE
        super().__init__(directory)
        _check_layers(self.values, self)

    def config(self, heads: Heads) -> Emu35Config:
        """Of the backbone."""
        return parse_config(self.values, heads, found_head_dim(self, "backbone." if self.released else "model."))


def read_official(state_dict: dict[str, Tensor], values: dict[str, Any], heads: Heads) -> Emu35:
    """See `Emu35.from_official`."""
    source = StateDict(state_dict)
    _check_layers(values, source)
    return read_backbone(source, parse_config(values, heads, found_head_dim(source)))


def read_directory(directory: str | Path, heads: Heads) -> Emu35:
    """See `Emu35.from_directory`."""
    source = OfficialDirectory(directory)
    return read_backbone(source, source.config(heads))


def read_backbone(
    source: TensorSource, config: Emu35Config, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Emu35:
    """The weights are read into memory of `device`; dtype None = that of the source."""
    tables = filter(is_table, source.keys())
    return build_filled(lambda: Emu35(config), source, backbone_renames(config), device, dtype, tables)


def write_official(backbone: Emu35, source: str | Path | None) -> dict[str, Tensor]:
    """See `Emu35.to_official`."""
    ours = {**backbone.state_dict(), "head.weight": backbone.head.weight}
    return with_text_rows(split_rows(ours, backbone_renames(backbone.config)), (HEAD,), backbone.config, source)


def with_text_rows(
    official: dict[str, Tensor], heads: tuple[str, ...], config: Emu35Config, source: str | Path | None
) -> dict[str, Tensor]:
    """The state dict with whole `heads`: text rows that the model does not hold come from the directory `source`."""
    n_text = config.vocab_size - config.head_rows
    if n_text and source is None:
        raise ValueError(
            "the model holds visual heads only; give source=DIR, the checkpoint it came from, for the text rows of "
            f"{' and '.join(heads)}."
        )
    if n_text and source is not None:
        text = SafetensorsDirectory(source)
        official |= {key: torch.cat([text.rows(key, 0, n_text).to(official[key]), official[key]]) for key in heads}
    return official
