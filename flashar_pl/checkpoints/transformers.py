"""State dicts of `transformers` models in and out: one table of names for all Llama-shaped decoders, read both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.decoder import Decoder
from flashar_pl.backbones.decoder_config import DecoderConfig, Heads
from flashar_pl.backbones.families import KNOWN, NOT_THESE, Family, find_family
from flashar_pl.checkpoints.description import check_layers
from flashar_pl.checkpoints.llama_names import HEAD, body_renames, head_rename, is_table
from flashar_pl.renames import Rename, StateDict, TensorSource, build_filled, split_rows

OTHER_PARTS = {
    "vqmodel", "vision_model", "aligner", "visual", "gen_vae", "gen_transformer", "gen_image_condition_refiner",
    "image_tokenizer", "lm_norm",
}  # fmt: skip
"""Image encoders and decoders beside the language model, and what it has for text alone, by a part of their names."""


OF_ONE = {
    ("generation_embeddings",): "janus",
    ("mm_embed_tokens",): "x-omni",
    ("gen_embed_tokens",): "mammothmoda2",
    ("text_model", "vqmodel"): "emu3",
}
"""Parts of names that one family has."""


class Joined(TensorSource):
    """A source, in which pairs of tensors are one: the rows of the first, then those of the second, by the first."""

    def __init__(self, inner: TensorSource, pairs: Mapping[str, str]) -> None:
        self.inner, self.pairs, self.name = inner, pairs, inner.name

    def keys(self) -> Iterable[str]:
        hidden = {*self.pairs.values()}
        return [key for key in list(self.inner.keys()) if key not in hidden]

    def shape(self, key: str) -> tuple[int, ...]:
        first = self.inner.shape(key)
        return first if key not in self.pairs else (first[0] + self.inner.shape(self.pairs[key])[0], *first[1:])

    def dtype(self, key: str) -> torch.dtype:
        return self.inner.dtype(key)

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        n = self.inner.shape(key)[0]
        if key not in self.pairs or end <= n:
            return self.inner.rows(key, begin, end)
        second = self.inner.rows(self.pairs[key], max(begin - n, 0), end - n)
        return second if begin >= n else torch.cat([self.inner.rows(key, begin, n), second])


class LanguageModel(TensorSource):
    """The tensors of a `transformers` model as a decoder reads them, and what its config.json says.

    Rows are in `row_order`; where the head is tied, it is the embedding.
    """

    def __init__(self, source: TensorSource, values: Mapping[str, Any], heads: Heads) -> None:
        """Raises ValueError for an unknown model_type, a feature that decoders lack, or tensors of another model."""
        self.name = source.name
        keys = list(source.keys())
        self.family = known_family(values, source)
        text = (values.get("llm_config") or values).get("text_config") or values
        check_layers(text, "num_hidden_layers", len(keys))
        prefix, config = text_prefix(keys, values, self.family), self.family.config(values)
        check_layers(vars(config), "code_layers", len(keys))
        head = min((key for key in keys if _is_head(key)), key=len, default=HEAD)
        tied = head not in keys and config.code_width is None
        if tied and not (values.get("tie_word_embeddings") or text.get("tie_word_embeddings")):
            raise ValueError(f"{self.name} has no {HEAD}, and config.json does not set tie_word_embeddings.")
        self.config = replace(
            config,
            text_prefix=prefix,
            head_key=head,
            tied_head=tied,
            heads=heads if config.code_width is None and config.has_codes else config.heads,
        )
        pairs = joined(self.config, self.family)
        if absent := [key for key in pairs.values() if key not in keys]:
            raise ValueError(f"{self.name} has no {', '.join(absent)}, and config.json says that it has.")
        self.inner = Joined(source, pairs)
        self.beside = [key for key in keys if _is_beside(key, config)]
        """Names of what belongs to parts beside the decoder."""

    def keys(self) -> Iterable[str]:
        return [*self.inner.keys(), self.config.head_key] if self.config.tied_head else self.inner.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.inner.shape(self._stored(key))

    def dtype(self, key: str) -> torch.dtype:
        return self.inner.dtype(self._stored(key))

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        order = row_order(self.config, key)
        if order is None:
            return self.inner.rows(self._stored(key), begin, end)
        wanted = torch.tensor(order[begin:end])
        first, last = int(wanted.min()), int(wanted.max())
        rows = self.inner.rows(self._stored(key), first, last + 1)
        return rows[(wanted - first).to(rows.device)]

    def _stored(self, key: str) -> str:
        tied = self.config.tied_head and key == self.config.head_key
        return embedding_key(self.config, self.family) if tied else key

    def renames(self, ours: str = "", head: str = "head") -> list[Rename]:
        """Names of everything that a decoder reads. ours: prefix of our names; head: our name of the head."""
        return renames(self.config, self.family, ours, head)


def renames(config: DecoderConfig, family: Family, ours: str = "", head: str = "head") -> list[Rename]:
    """Our names and theirs. Rows of a full head: see `DecoderConfig.head_order`."""
    text = config.text_prefix
    found = [*body_renames(config, ours, text, family.block_names, family.body_names)]
    if config.code_width is None:
        return [*found, head_rename(config, f"{head}.weight", config.head_key)]
    outer = text.removesuffix("language_model.")
    for name, theirs in family.code_names(config).items():
        own = head if name == "head" else ours + name
        kinds = ("weight",) if name == "code_mlp.vectors" else ("weight", "bias")
        found += [Rename(f"{own}.{kind}", (f"{outer}{theirs}.{kind}",)) for kind in kinds]
    return found


def embedding_key(config: DecoderConfig, family: Family) -> str:
    """Their name of the embedding."""
    return f"{config.text_prefix}{family.body_names[0]}.weight"


def joined(config: DecoderConfig, family: Family) -> dict[str, str]:
    """Their tensors of text that go on in another one of images."""
    if config.text_rows is None:
        return {}
    embedding, head = (f"{name}.weight" for name in family.image_names)
    return {
        embedding_key(config, family): config.text_prefix + embedding,
        config.head_key: config.head_key.removesuffix(HEAD) + head,
    }


def row_order(config: DecoderConfig, key: str) -> tuple[int, ...] | None:
    """Their row of every row of ours of one of their tensors; None = the same."""
    if key == config.head_key:
        return config.head_order
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}.get(key.rpartition(".")[0].rpartition(".")[2])
    if heads is None or config.rope_order is None:
        return None
    return tuple(head * config.head_dim + i for head in range(heads) for i in config.rope_order)


def read_transformers(state_dict: Mapping[str, Tensor], values: Mapping[str, Any], heads: Heads) -> Decoder:
    """See `flashar_pl.backbones.from_transformers`."""
    source = StateDict(state_dict)
    model = LanguageModel(source, values, heads)
    backbone = build_filled(lambda: Decoder(model.config), model, model.renames(), ignored=model.beside)
    backbone.rest = {key: source.tensors[key] for key in model.beside}
    return backbone


def write_transformers(backbone: Decoder) -> dict[str, Tensor]:
    """See `Decoder.to_transformers`."""
    config = backbone.config
    if config.code_width is None and config.head_rows < config.full_rows:
        raise ValueError('the model holds the heads of its codes only; expected one loaded with heads="full".')
    if config.model_type not in KNOWN:
        raise ValueError(f"the family {config.model_type!r} is not known here; register it first: register_family.")
    ours = {**backbone.state_dict(), "head.weight": backbone.head.weight}
    if backbone.head.bias is not None:
        ours["head.bias"] = backbone.head.bias
    family = KNOWN[config.model_type]
    found = split_rows(ours, renames(config, family))
    for key, tensor in found.items():
        if (order := row_order(config, key)) is not None:
            found[key] = tensor[torch.tensor(order, device=tensor.device).argsort()]
    for key, second in joined(config, family).items():
        found[key], found[second] = (part.clone() for part in found[key].tensor_split([config.text_rows or 0]))
    if config.tied_head and not torch.equal(found.pop(config.head_key), found[embedding_key(config, family)]):
        raise ValueError(
            "config.json ties the head to the embedding, and training has parted them; save it as a FlashAR checkpoint."
        )
    return {**found, **backbone.rest}


def _is_beside(key: str, config: DecoderConfig) -> bool:
    """Whether a tensor belongs to a part beside the decoder."""
    unused = _is_head(key) and config.code_width is not None
    return not OTHER_PARTS.isdisjoint(key.split(".")) or is_table(key) or unused


def _is_head(key: str) -> bool:
    """Whether this is the head over the vocabulary."""
    return key == HEAD or key.endswith("." + HEAD)


def known_family(values: Mapping[str, Any], source: TensorSource | None = None) -> Family:
    """The family of a config.json. Raises ValueError that names the known ones, and the one whose tensors are like
    those of `source`."""
    family, name = find_family(values), values.get("model_type")
    if family is not None:
        return family
    known = f"model_type in config.json is {name!r}; known: {', '.join(KNOWN)}."
    if str(name).lower() in NOT_THESE:
        raise ValueError(f"{known} This one is left out because {NOT_THESE[str(name).lower()]}.")
    nearest = None if source is None else _closest_family(source)
    hint = "" if nearest is None else f" Its tensors are like those of {nearest}: that as model_type may read them."
    raise ValueError(known + hint)


def _closest_family(source: TensorSource) -> str | None:
    """The family with such tensors in its first layer; None where that is no such layer."""
    keys = set(source.keys())
    first = next((key.split("self_attn.")[0] for key in sorted(keys) if ".0.self_attn.q_proj." in key), None)
    if first is None:
        return None
    parts = {part for key in keys for part in key.split(".")}
    for own, family in OF_ONE.items():
        if parts.issuperset(own):
            return family
    if f"{first}post_mlp_layernorm.weight" in keys:
        return "glm_image"
    if (norm := f"{first}self_attn.q_norm.weight") in keys:
        return "qwen3" if len(source.shape(norm)) == 1 else "chameleon"
    return "qwen2" if f"{first}self_attn.q_proj.bias" in keys else "llama"


def text_prefix(keys: Iterable[str], values: Mapping[str, Any], family: Family) -> str:
    """What stands before the names of the language model. Raises ValueError where there is none."""
    name = f"{family.body_names[0]}.weight"
    found = sorted((key for key in keys if key == name or key.endswith("." + name)), key=len)
    if not found:
        kind = values.get("model_type")
        raise ValueError(f"the state dict has no {name}; expected the weights of a model of type {kind!r}.")
    return found[0].removesuffix(name)
