"""Official LlamaGen weights in and out: one table of names, read in both directions, strict both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.methods import LLAMAGEN, check_method
from flashar_pl.renames import Rename, StateDict, build_filled, split_rows, unwrapped

TOP = {"code_embedding.weight": "tok_embeddings.weight", "norm.weight": "norm.weight", "head.weight": "output.weight"}
CLASS = {"condition_embedding.table.weight": "cls_embedding.embedding_table.weight"}
TEXT = {
    "condition_embedding.null": "cls_embedding.uncond_embedding",
    "condition_embedding.fc1.weight": "cls_embedding.cap_proj.fc1.weight",
    "condition_embedding.fc2.weight": "cls_embedding.cap_proj.fc2.weight",
}
BLOCK = (
    *(Rename(name, (name,)) for name in ("attention_norm.weight", "attention.wqkv.weight", "attention.wo.weight")),
    Rename("ffn_norm.weight", ("ffn_norm.weight",)),
    Rename("feed_forward.w13.weight", ("feed_forward.w1.weight", "feed_forward.w3.weight")),
    Rename("feed_forward.w2.weight", ("feed_forward.w2.weight",)),
)

IGNORED = re.compile(r"(^freqs_cis$|\.kv_cache\.[kv]_cache$|^causal_mask$)")
"""Tables and caches that some saved files carry; they are not weights."""
NAME = "the LlamaGen state dict"
PREFIX = "model."
"""What a module around the model leaves before every name."""


def clean_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what wrappers left behind, tables and caches."""
    cleaned = {unwrapped(key).removeprefix(PREFIX): value for key, value in state_dict.items()}
    return {key: value for key, value in cleaned.items() if not IGNORED.search(key)}


def block_renames(ours: str, official: str) -> Iterator[Rename]:
    """Names of one block under the given prefixes."""
    return (rename.under(ours, official) for rename in BLOCK)


def backbone_renames(n_layer: int, condition: str) -> Iterator[Rename]:
    """Names of a whole backbone."""
    for ours, official in (TOP | (CLASS if condition == "class" else TEXT)).items():
        yield Rename(ours, (official,))
    for i in range(n_layer):
        yield from block_renames(f"blocks.{i}.", f"layers.{i}.")


def infer_config(
    state_dict: dict[str, Tensor], n_head: int, *, n_layer: int, rope_base: float, norm_eps: float
) -> LlamaGenConfig:
    """Sizes from the tensors of a cleaned official state dict."""
    required = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    if absent := [key for key in required if key not in state_dict]:
        raise ValueError(f"not a LlamaGen checkpoint: missing keys ({', '.join(absent)}).")
    vocabulary, dim = state_dict["tok_embeddings.weight"].shape
    if n_head < 1 or dim % n_head:
        raise ValueError(f"n_head is {n_head}; expected a divisor of the width {dim} found in the checkpoint.")
    n_kv_head, rest = divmod(len(state_dict["layers.0.attention.wqkv.weight"]) - dim, 2 * (dim // n_head))
    if n_kv_head < 1 or n_head % n_kv_head or rest:
        raise ValueError(
            f"n_head {n_head} does not fit the checkpoint's wqkv of width {dim}; give its true head count."
        )
    common: dict[str, Any] = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": None if n_kv_head == n_head else n_kv_head,
        "vocab_size": vocabulary,
        "ffn_dim": state_dict["layers.0.feed_forward.w1.weight"].shape[0],
        "rope_base": rope_base,
        "norm_eps": norm_eps,
    }
    if "cls_embedding.cap_proj.fc1.weight" in state_dict:
        caption_dim = state_dict["cls_embedding.cap_proj.fc1.weight"].shape[1]
        null = state_dict.get("cls_embedding.uncond_embedding")
        positions = {} if null is None else {"caption_positions": len(null)}  # without it `fill` names the key
        return LlamaGenConfig(**common, condition="text", caption_dim=caption_dim, **positions)
    if "cls_embedding.embedding_table.weight" not in state_dict:
        raise ValueError("not a LlamaGen checkpoint: neither a class table nor a caption projection was found.")
    return LlamaGenConfig(**common, num_classes=len(state_dict["cls_embedding.embedding_table.weight"]) - 1)


def count_layers(state_dict: dict[str, Tensor]) -> int:
    """Number of `layers.i.` groups; they must be numbered 0..n-1."""
    found = {int(match[1]) for key in state_dict if (match := re.match(r"layers\.(\d+)\.", key))}
    if found != set(range(len(found))):
        raise ValueError(f"layers are numbered {sorted(found)}; expected 0 to {len(found) - 1}.")
    return len(found)


def read_official(
    state_dict: Mapping[str, Tensor],
    n_head: int,
    *,
    rope_base: float = 10000.0,
    norm_eps: float = 1e-5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LlamaGen:
    """See `LlamaGen.from_official`. dtype None = that of the weights."""
    cleaned = clean_official(state_dict)
    check_method(cleaned, LLAMAGEN, unknown=True)  # missing names are told later
    config = infer_config(cleaned, n_head, n_layer=count_layers(cleaned), rope_base=rope_base, norm_eps=norm_eps)
    renames = list(backbone_renames(config.n_layer, config.condition))
    return build_filled(lambda: LlamaGen(config), StateDict(cleaned, NAME), renames, device, dtype)


def write_official(backbone: LlamaGen) -> dict[str, Tensor]:
    """See `LlamaGen.to_official`."""
    ours = {**backbone.state_dict(), "head.weight": backbone.head.weight}
    return split_rows(ours, backbone_renames(backbone.n_layer, backbone.config.condition))
