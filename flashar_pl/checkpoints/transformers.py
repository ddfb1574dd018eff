"""State dicts of `transformers` models in and out: one table of names for all Llama-shaped decoders, read both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.decoder import Decoder, DecoderConfig, Heads
from flashar_pl.backbones.families import KNOWN, Family, family_of
from flashar_pl.checkpoints.description import check_layers
from flashar_pl.checkpoints.llama_names import HEAD, body_renames, head_rename, is_table
from flashar_pl.renames import Rename, StateDict, build_filled, split_rows

EMBEDDING = "embed_tokens.weight"
OTHER_PARTS = {"vqmodel", "vision_model", "aligner", "visual"}
"""Image encoders and decoders beside the language model, by a part of their tensors' names."""


def renames(config: DecoderConfig, family: Family) -> list[Rename]:
    """Names of everything that a decoder reads. Rows of a full head: see `DecoderConfig.head_order`."""
    text = config.text_prefix
    found = [*body_renames(config, "", text)]
    if config.code_width is None:
        return [*found, head_rename(config, "head.weight", HEAD)]
    outer = text.removesuffix("language_model.")
    for ours, theirs in family.code_names(config).items():
        kinds = ("weight",) if ours == "code_mlp.vectors" else ("weight", "bias")
        found += [Rename(f"{ours}.{kind}", (f"{outer}{theirs}.{kind}",)) for kind in kinds]
    return found


def read_transformers(state_dict: Mapping[str, Tensor], values: Mapping[str, Any], heads: Heads) -> Decoder:
    """See `flashar_pl.backbones.from_transformers`."""
    family, source = family_of(values), StateDict(state_dict)
    check_layers(values.get("text_config") or values, "num_hidden_layers", len(source.tensors))
    text, config = text_prefix(source.keys(), values), family.read(values)
    beside = {key: tensor for key, tensor in source.tensors.items() if _is_beside(key, config)}
    tied = HEAD not in source.tensors and config.code_width is None
    config = replace(
        config,
        model_type=values["model_type"],
        text_prefix=text,
        tied_head=tied,
        heads=heads if config.code_width is None and config.has_codes else config.heads,
    )
    if tied:
        if not (values.get("tie_word_embeddings") or (values.get("text_config") or {}).get("tie_word_embeddings")):
            raise ValueError(f"the state dict has no {HEAD}, and config.json does not set tie_word_embeddings.")
        source.tensors[HEAD] = source.tensors[text + EMBEDDING]
    if config.head_order is not None and len(source.tensors[HEAD]) == config.vocab_size:
        source.tensors[HEAD] = source.tensors[HEAD][torch.tensor(config.head_order)]
    backbone = build_filled(lambda: Decoder(config), source, renames(config, family), ignored=beside)
    backbone.rest = beside
    return backbone


def write_transformers(backbone: Decoder) -> dict[str, Tensor]:
    """See `Decoder.to_transformers`."""
    config = backbone.config
    if config.code_width is None and config.head_rows < config.vocab_size:
        raise ValueError('the model holds the heads of its codes only; expected one loaded with heads="full".')
    ours = {**backbone.state_dict(), "head.weight": backbone.head.weight}
    if backbone.head.bias is not None:
        ours["head.bias"] = backbone.head.bias
    found = split_rows(ours, renames(config, KNOWN[config.model_type]))
    if config.head_order is not None:
        found[HEAD] = found[HEAD][torch.tensor(config.head_order, device=found[HEAD].device).argsort()]
    if config.tied_head and not torch.equal(found.pop(HEAD), found[config.text_prefix + EMBEDDING]):
        raise ValueError(
            "config.json ties the head to the embedding, and training has parted them; save it as a FlashAR checkpoint."
        )
    return {**found, **backbone.rest}


def _is_beside(key: str, config: DecoderConfig) -> bool:
    """Whether a tensor belongs to a part beside the decoder."""
    return (
        not OTHER_PARTS.isdisjoint(key.split(".")) or is_table(key) or (key == HEAD and config.code_width is not None)
    )


def text_prefix(keys: Iterable[str], values: Mapping[str, Any]) -> str:
    """What stands before the names of the language model. Raises ValueError where there is none."""
    found = sorted((key for key in keys if key == EMBEDDING or key.endswith("." + EMBEDDING)), key=len)
    if not found:
        kind = values.get("model_type")
        raise ValueError(f"the state dict has no {EMBEDDING}; expected the weights of a model of type {kind!r}.")
    return found[0].removesuffix(EMBEDDING)
