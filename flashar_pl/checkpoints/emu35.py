"""Official Emu3.5 weights in and out: one table of names, read in both directions, strict both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.emu35 import Emu35, Emu35Config, Heads
from flashar_pl.backbones.families.base import text_settings
from flashar_pl.checkpoints.description import check_layers
from flashar_pl.checkpoints.llama_names import HEAD, body_renames, head_rename, is_table
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory
from flashar_pl.renames import Rename, StateDict, TensorSource, build_filled, split_rows
from flashar_pl.text_files import read_json

MODEL_TYPE = "emu3_flashar"
"""`model_type` in the config.json of the FlashAR authors' checkpoints."""


def backbone_renames(config: Emu35Config, ours: str = "", head: str = "head.weight") -> list[Rename]:
    """Names of a whole official checkpoint; `ours` is the prefix of our names, `head` our name of the head."""
    return [*body_renames(config, ours, "model."), head_rename(config, head, HEAD)]


def parse_config(values: dict[str, Any], heads: Heads, head_dim: int | None = None) -> Emu35Config:
    """Our config from a HF config.json. head_dim: width found in the weights, used where config.json has none.

    Raises:
        ValueError: a needed field is missing, or a feature that Emu3.5 does not have is switched on.
    """
    outer, values = values, values.get("backbone_config", values)
    if not isinstance(values, dict):
        raise ValueError("config.json holds no settings of a model; expected an Emu3.5 config.json.")
    if values.get("tie_word_embeddings"):
        raise ValueError("config.json sets tie_word_embeddings, which Emu3.5 does not use.")
    values = {**values, "head_dim": values.get("head_dim") or head_dim}
    settings = text_settings(values, "Emu3.5", {}, needed=("num_key_value_heads", "head_dim"))
    for name, usual in (("rope_scaling", None), ("activation", "silu")):
        if settings[name] != usual:
            field = {"activation": "hidden_act"}.get(name, name)
            raise ValueError(f"config.json sets {field} to {settings[name]!r}, which Emu3.5 does not use.")
    return Emu35Config(
        **settings,
        visual_token_offset=_visual_offset(outer, values),
        eol_token_id=values.get("eol_token_id"),
        boi_token_id=values.get("boi_token_id"),
        heads=heads,
    )


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

    kind = Emu35.kind
    """Of its backbone."""
    tokenizer = None
    """It is published apart."""

    def __init__(self, directory: str | Path) -> None:
        self.values = read_json(Path(directory) / "config.json")
        self.released = self.values.get("model_type") == MODEL_TYPE
        super().__init__(directory)
        _check_layers(self.values, self)
        check_layers(self.values, "vertical_layers", len(self.stored))

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
