"""Emu3.5 (BAAI, 2025): a text-and-image transformer whose vocabulary holds text tokens, then the visual codes.

Shapes: B samples, R rows, P prefix, S slots, D width, E head width, T token ids, V visual codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

from torch import Tensor

from flashar_pl.backbones.decoder import Decoder
from flashar_pl.backbones.decoder_config import DecoderConfig, Heads
from flashar_pl.layers.transformer import QKNorm


@dataclass(frozen=True)
class Emu35Config(DecoderConfig):
    """Everything that defines an Emu3.5 model: a decoder with norms of queries and keys, and row ends."""

    qk_norm: QKNorm = "rms"
    """Norm of each head's query and key."""


NO_TEXT = (151849, 2610, 525, 264, 10950, 17847, 13, 13872, 25, 220, 35560, 3846, 2821, 25, 220, 151746)
"""Ids of the published unconditional prompt; `Emu35Text.unconditional` makes them from the rank file."""
PRESETS: dict[str, Emu35Config] = {
    "emu35-34b": Emu35Config(  # 34,103,460,864 parameters with full heads
        dim=5120,
        n_layer=64,
        n_head=64,
        n_kv_head=8,
        head_dim=128,
        ffn_dim=25600,
        vocab_size=282926,
        rope_base=1e6,
        norm_eps=1e-6,
        visual_token_offset=282926 - 131072,
        eol_token_id=151846,
        boi_token_id=151852,
        unconditional_prompt=NO_TEXT,
    ),
}
"""Published sizes, for measurements with random weights. A checkpoint is read with its own config.json."""


class Emu35(Decoder):
    """An Emu3.5 model; see `Emu35Config`, and `Decoder` for conditions and positions."""

    kind = "emu35"
    config_type, published = Emu35Config, PRESETS
    example: ClassVar = {
        "dim": 64, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 1300,
        "visual_token_offset": 1024, "eol_token_id": 1001, "norm_eps": 1e-6, "rope_base": 1e6, "heads": "visual",
    }  # fmt: skip
    homes: ClassVar = {r"Emu3\.5-Image": "https://huggingface.co/BAAI/Emu3.5-Image"}
    published_cfg_scale = 5.0
    usual_grid = (32, 32)  # 512 x 512 pixels, at which the released FlashAR weights were trained
    usual_clones = 4  # as the released FlashAR weights
    config: Emu35Config

    def __init__(self, config: Emu35Config) -> None:
        super().__init__(config)
        self.row_ends = True  # without eol_token_id it serves text, and diagonals

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], config: dict[str, Any], heads: Heads = "full") -> Emu35:
        """A model from an official state dict and its config.json (a dict, or nested under "backbone_config").

        Epsilon and RoPE base come from `config` and are never assumed. Dropout is off; official training used the
        `attention_dropout` of config.json. Missing, unknown or misshapen keys raise ValueError.
        """
        return resolve_name("flashar_pl.checkpoints.emu35:read_official")(state_dict, config, heads)

    @classmethod
    def from_directory(cls, directory: str | Path, heads: Heads = "full") -> Emu35:
        """A model from an official directory: config.json and one or many safetensors files, read tensor by tensor."""
        return resolve_name("flashar_pl.checkpoints.emu35:read_directory")(directory, heads)

    def to_official(self, source: str | Path | None = None) -> dict[str, Tensor]:
        """The official state dict, bit-exact inverse of `from_official`.

        source: directory of the checkpoint this model came from; heads="visual" takes the text rows of the head there.
        """
        return resolve_name("flashar_pl.checkpoints.emu35:write_official")(self, source)
