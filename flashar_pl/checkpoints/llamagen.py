"""Official LlamaGen weights in and out: one table of names, read in both directions, strict both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import CaptionEmbedding, LlamaGen, LlamaGenConfig

Rename = tuple[str, tuple[str, ...]]
"""One of our keys and the official keys whose rows it holds, in order."""

TOP: dict[str, tuple[str, ...]] = {
    "code_embedding.weight": ("tok_embeddings.weight",),
    "norm.weight": ("norm.weight",),
    "head.weight": ("output.weight",),
}
CLASS = {"condition_embedding.table.weight": ("cls_embedding.embedding_table.weight",)}
TEXT = {
    "condition_embedding.null": ("cls_embedding.uncond_embedding",),
    "condition_embedding.fc1.weight": ("cls_embedding.cap_proj.fc1.weight",),
    "condition_embedding.fc2.weight": ("cls_embedding.cap_proj.fc2.weight",),
}
BLOCK: dict[str, tuple[str, ...]] = {
    "attention_norm.weight": ("attention_norm.weight",),
    "attention.wqkv.weight": ("attention.wqkv.weight",),
    "attention.wo.weight": ("attention.wo.weight",),
    "ffn_norm.weight": ("ffn_norm.weight",),
    "feed_forward.w13.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "feed_forward.w2.weight": ("feed_forward.w2.weight",),
}

IGNORED = re.compile(r"(^freqs_cis$|\.kv_cache\.[kv]_cache$|^causal_mask$)")
"""Tables and caches that some saved files carry; they are not weights."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Name prefixes that DDP, torch.compile and wrappers leave behind."""


def clean_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without wrapper prefixes, tables and caches."""
    cleaned = {}
    for key, value in state_dict.items():
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        if not IGNORED.search(key):
            cleaned[key] = value
    return cleaned


def block_renames(ours: str, official: str) -> Iterator[Rename]:
    """Names of one block under the given prefixes."""
    for key, sources in BLOCK.items():
        yield ours + key, tuple(official + source for source in sources)


def backbone_renames(n_layer: int, condition: str) -> Iterator[Rename]:
    """Names of a whole backbone."""
    yield from TOP.items()
    yield from (CLASS if condition == "class" else TEXT).items()
    for i in range(n_layer):
        yield from block_renames(f"blocks.{i}.", f"layers.{i}.")


def gather(state_dict: dict[str, Tensor], renames: list[Rename]) -> dict[str, Tensor]:
    """Our state dict from an official one; missing or unknown keys raise ValueError."""
    wanted = {source for _, sources in renames for source in sources}
    missing = sorted(wanted - state_dict.keys())
    unknown = sorted(state_dict.keys() - wanted)
    if missing or unknown:
        raise ValueError(
            f"not the expected LlamaGen checkpoint: {_some('missing keys', missing)}; {_some('unknown keys', unknown)}."
        )
    return {
        ours: torch.cat([state_dict[s] for s in sources]) if len(sources) > 1 else state_dict[sources[0]].clone()
        for ours, sources in renames
    }


def scatter(ours: dict[str, Tensor], renames: list[Rename]) -> dict[str, Tensor]:
    """The official state dict from ours; the inverse of `gather`. Row blocks of one key have equal sizes."""
    official = {}
    for key, sources in renames:
        for source, rows in zip(sources, ours[key].detach().chunk(len(sources))):
            official[source] = rows.clone()
    return official


def infer_config(
    state_dict: dict[str, Tensor], n_head: int, *, n_layer: int, rope_base: float, norm_eps: float
) -> LlamaGenConfig:
    """Sizes from the tensors of a cleaned official state dict."""
    required = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    absent = [key for key in required if key not in state_dict]
    if absent:
        raise ValueError(f"not a LlamaGen checkpoint: {_some('missing keys', absent)}.")
    vocabulary, dim = state_dict["tok_embeddings.weight"].shape
    if n_head < 1 or dim % n_head:
        raise ValueError(f"n_head is {n_head}; expected a divisor of the width {dim} found in the checkpoint.")
    head_dim = dim // n_head
    n_kv_head = (state_dict["layers.0.attention.wqkv.weight"].shape[0] - dim) // (2 * head_dim)
    if (
        n_kv_head < 1
        or n_head % n_kv_head
        or dim + 2 * n_kv_head * head_dim != len(state_dict["layers.0.attention.wqkv.weight"])
    ):
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
        positions = {} if null is None else {"caption_positions": len(null)}  # without it `gather` names the key
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


def read_official(state_dict: dict[str, Tensor], n_head: int, *, rope_base: float, norm_eps: float) -> LlamaGen:
    """See `LlamaGen.from_official`."""
    cleaned = clean_official(state_dict)
    config = infer_config(cleaned, n_head, n_layer=count_layers(cleaned), rope_base=rope_base, norm_eps=norm_eps)
    return build_empty(config, gather(cleaned, list(backbone_renames(config.n_layer, config.condition))))


def build_empty(config: LlamaGenConfig, weights: dict[str, Tensor]) -> LlamaGen:
    """A backbone that takes `weights` as they are, without initialising others first."""
    with torch.device("meta"):
        backbone = LlamaGen(config)
    load_strictly(backbone, weights)
    return backbone


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Make `weights` the module's own, without a copy, and put it in evaluation mode.

    A wrong shape raises ValueError naming the key and both shapes.
    """
    expected = module.state_dict()
    for key, value in weights.items():
        if key in expected and expected[key].shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; this model expects {tuple(expected[key].shape)}.")
    try:
        module.load_state_dict({key: value.detach() for key, value in weights.items()}, strict=True, assign=True)
    except RuntimeError as error:  # missing or unexpected keys
        raise ValueError(f"the weights do not fit the model: {error}") from error
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    module.eval()


def write_official(backbone: LlamaGen) -> dict[str, Tensor]:
    """See `LlamaGen.to_official`."""
    ours = {**backbone.state_dict(), "head.weight": backbone.head.weight}
    assert isinstance(backbone.condition_embedding, CaptionEmbedding) == (backbone.config.condition == "text")
    return scatter(ours, list(backbone_renames(backbone.n_layer, backbone.config.condition)))


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return f"no {what}"
    return f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
