"""Names of Llama-shaped decoders, as Emu3.5 and the models of `transformers` have them, in one table read both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.renames import Rename

HEAD = "lm_head.weight"
Names = Mapping[str, tuple[str, ...]]
OWN: Names = {}


def block_renames(config: DecoderConfig, ours: str, theirs: str, own: Names = OWN) -> Iterator[Rename]:
    """Names of one block under the given prefixes, with the rows of each of their tensors. own: their names where they
    are others than Llama's, by ours."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    qkv, kinds = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}, ("weight", "bias")
    post, of_norm = config.norm_place == "after", 1 + (config.norm == "layer")
    table: dict[str, tuple[Mapping[str, int] | tuple[str, ...], int]] = {
        "attention.wqkv": (qkv, 1 + config.qkv_bias),
        "attention.wo": (("self_attn.o_proj",), 1 + config.output_bias),
        "feed_forward.w13": (("mlp.gate_proj", "mlp.up_proj"), 1 + config.ffn_bias),
        "feed_forward.w2": (("mlp.down_proj",), 1 + config.ffn_bias),
        "attention_post_norm" if post else "attention_norm": (("input_layernorm",), of_norm),
        "ffn_post_norm" if post else "ffn_norm": (("post_attention_layernorm",), of_norm),
    }
    if config.qk_norm != "none":
        n = 2 if config.qk_norm == "layer" else 1
        table |= {f"attention.{name}": ((f"self_attn.{name}",), n) for name in ("q_norm", "k_norm")}
    for key, theirs_own in own.items():
        table[key] = theirs_own, table[key][1] if key in table else of_norm if key.endswith("norm") else 1
    for key, (pieces, n) in table.items():
        sizes = tuple(pieces.values()) if isinstance(pieces, Mapping) else None
        for kind in kinds[:n]:
            yield Rename(f"{ours}{key}.{kind}", tuple(f"{theirs}{name}.{kind}" for name in pieces), sizes)


def kinds(config: DecoderConfig, layer: int) -> Names:
    """Names of both feed-forwards of a block, where text has one of its own."""
    if not config.block.text_ffn or layer not in range(*(config.image_layers or (0, config.n_layer))):
        return {}
    return {
        f"{part}.{linear}": tuple(f"{theirs}.{name}_proj" for name in names)
        for part, theirs in (("feed_forward", "gen_mlp"), ("text_feed_forward", "mlp"))
        for linear, names in (("w13", ("gate", "up")), ("w2", ("down",)))
    }


def body_renames(
    config: DecoderConfig, ours: str, official: str, own: Names = OWN, outer: tuple[str, str] = ("embed_tokens", "norm")
) -> Iterator[Rename]:
    """Names of embedding, blocks and final norm under the given prefixes. outer: theirs of the first and the last."""
    yield Rename(f"{ours}embedding.weight", (f"{official}{outer[0]}.weight",))
    for i in range(config.n_layer):
        yield from block_renames(config, f"{ours}blocks.{i}.", f"{official}layers.{i}.", {**own, **kinds(config, i)})
    for kind in ("weight", "bias")[: 1 + (config.norm == "layer")]:
        yield Rename(f"{ours}norm.{kind}", (f"{official}{outer[1]}.{kind}",))


def head_rename(config: DecoderConfig, ours: str, official: str) -> Rename:
    """Name of a head; heads="visual" skips the text rows."""
    return Rename(ours, (official,), skip=config.full_rows - config.head_rows)


def is_table(key: str) -> bool:
    """Whether an entry is a RoPE table that some saved files carry, and no weight."""
    return key.endswith("rotary_emb.inv_freq")
