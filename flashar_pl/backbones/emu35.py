"""Emu3.5 (BAAI, 2025): a text-and-image transformer whose vocabulary holds text tokens, then the visual codes.

Shapes: B samples, R rows, P prefix, S slots, D width, E head width, T token ids, V visual codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flashar_pl.backbones.base import Backbone, check_dropout, initialise
from flashar_pl.backbones.condition import Condition, Conditioning, Given, Prefix, Prompts
from flashar_pl.grid import ROW_END, DecodePlan, raster_plan
from flashar_pl.layers.rope import Rope, angles_1d, rotations
from flashar_pl.layers.transformer import BlockConfig, RMSNorm
from flashar_pl.numerics import wide

Heads = Literal["full", "visual"]


@dataclass(frozen=True)
class Emu35Config:
    """Everything that defines an Emu3.5 model."""

    dim: int
    """Width D."""
    n_layer: int
    """Number of blocks L."""
    n_head: int
    """Query heads."""
    n_kv_head: int
    """Key/value heads."""
    head_dim: int
    """Head width E; n_head * E need not equal D."""
    ffn_dim: int
    """Feed-forward width."""
    vocab_size: int
    """Text tokens and visual codes together."""
    rope_base: float
    """Base of the RoPE frequencies."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    visual_token_offset: int | None = None
    """Token id of visual code 0; None = unknown, text only."""
    eol_token_id: int | None = None
    """Token id of the row end that the raster plan forces after every row but the last; None = unknown."""
    boi_token_id: int | None = None
    """Token id that begins an image. From here on the unconditional prefix equals the conditional one."""
    heads: Heads = "full"
    """"full": the heads score the whole vocabulary, and losses are normalised over it. "visual": visual codes only."""
    dropout: float = 0.0
    """Dropout on the embedded sequence, attention probabilities and both residual branches."""
    condition_dropout: float = 0.0
    """Probability that a training sample sees the unconditional prompt instead of its own."""
    unconditional_prompt: tuple[int, ...] | None = None
    """Token ids of the unconditional prompt, up to the begin of the image; None = guidance needs it given."""

    def __post_init__(self) -> None:
        if self.unconditional_prompt is not None:
            object.__setattr__(self, "unconditional_prompt", tuple(self.unconditional_prompt))
            if self.boi_token_id is None:
                raise ValueError("unconditional_prompt is given and boi_token_id is not; expected both.")
        if self.heads not in ("full", "visual"):
            raise ValueError(f'heads is {self.heads!r}; expected "full" or "visual".')
        if self.visual_token_offset is None and self.heads == "visual":
            raise ValueError('heads="visual" needs visual_token_offset (or eoi_token_id in config.json).')
        if self.visual_token_offset is not None and not 0 <= self.visual_token_offset < self.vocab_size:
            raise ValueError(f"visual_token_offset is {self.visual_token_offset}; expected 0 to {self.vocab_size - 1}.")
        check_dropout(self)
        if self.condition_dropout and self.unconditional_prompt is None:
            raise ValueError("condition_dropout needs unconditional_prompt, the token ids that replace a prompt.")

    @property
    def n_codes(self) -> int:
        """Number of visual codes V; 0 if their place in the vocabulary is unknown."""
        return 0 if self.visual_token_offset is None else self.vocab_size - self.visual_token_offset

    @property
    def head_rows(self) -> int:
        """Rows of each head."""
        return self.vocab_size if self.heads == "full" else self.n_codes

    @property
    def conditioning(self) -> Conditioning:
        """What the model is conditioned on."""
        usual = 50  # tokens of a prompt, the image prefix included
        return Conditioning("prompt", self.vocab_size, usual, self.visual_token_offset)

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        return BlockConfig(
            dim=self.dim,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            norm_eps=self.norm_eps,
            qk_norm=True,
            rope_interleaved=False,
            attn_dropout=self.dropout,
            resid_dropout=self.dropout,
            ffn_dropout=self.dropout,
        )


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


class Emu35(Backbone):
    """An Emu3.5 model; see `Emu35Config`.

    Condition: a list of B 1-D id tensors, each the whole prefix of an image (prompt, image begin, size digits, image
    token), of any lengths. Codes are 0-based; their place in the vocabulary is known here only. The embedding table
    always holds the whole vocabulary, for the prompts; `heads` concerns the output heads.

    Positions are those of pre-training, where every row ends with a token: with a prefix of n tokens, the code of
    (row, column) stands at n + row * (W + 1) + column, each sample counted from its own prefix.
    """

    kind = "emu35"
    config_type, published = Emu35Config, PRESETS
    example: ClassVar = {
        "dim": 64, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 1300,
        "visual_token_offset": 1024, "eol_token_id": 1001, "norm_eps": 1e-6, "rope_base": 1e6, "heads": "visual",
    }  # fmt: skip
    published_cfg_scale = 5.0
    usual_grid, many_grids = (32, 32), True  # 512 x 512 pixels, at which the released FlashAR weights were trained
    usual_clones = 4  # as the released FlashAR weights
    row_ends = True
    config: Emu35Config

    def __init__(self, config: Emu35Config) -> None:
        super().__init__()
        self.config = config
        self.dim, self.n_layer, self.vocabulary = config.dim, config.n_layer, config.n_codes
        self.first_code = config.visual_token_offset or 0 if config.heads == "full" else 0
        self.conditioning, self.block = config.conditioning, config.block
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.head_rows, bias=False)
        self.apply(initialise)

    @classmethod
    def training_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of the visual codes alone, and a tenth of the captions dropped, for guidance, where the unconditional
        prompt is known."""
        known = options.get("unconditional_prompt") is not None
        return {"heads": "visual", "condition_dropout": 0.1 if known else 0.0}

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

    @property
    def null_prompt(self) -> tuple[int, ...] | None:
        return self.config.unconditional_prompt

    def embed(self, codes: Tensor) -> Tensor:
        offset = self.config.visual_token_offset
        if offset is None:
            raise ValueError("config.json has neither visual_token_offset nor eoi_token_id; codes need one of them.")
        row_end = 0 if self.config.eol_token_id is None else self.config.eol_token_id  # `rope` refuses such plans
        return self.embedding((codes + offset).masked_fill(codes == ROW_END, row_end))

    def input_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def prefix(self, condition: Given) -> Prefix:
        """Left-padded, so that image slots start at the same column in every row."""
        assert isinstance(condition, list)
        rows = self._drop_condition(condition)
        counts = [len(ids) for ids in rows]
        device = rows[0].device
        lengths = torch.tensor(counts, device=device)
        x = self.embedding(pad_sequence(rows, batch_first=True, padding_side="left"))  # (R, P, D)
        if min(counts) == max(counts):
            return Prefix(x, lengths)
        return Prefix(x, lengths, torch.arange(max(counts), device=device) >= (max(counts) - lengths)[:, None])

    def _drop_condition(self, condition: list[Tensor]) -> list[Tensor]:
        """In training, replace each sample's prompt by the unconditional one with probability `condition_dropout`."""
        if not self.training or self.config.condition_dropout == 0:
            return condition
        dropped = torch.rand(len(condition)) < self.config.condition_dropout
        return [self.null_prefix(ids) if drop else ids for ids, drop in zip(condition, dropped.tolist())]

    def null_prefix(self, ids: Tensor) -> Tensor:
        """The prefix (T,) with its prompt replaced by the unconditional one; the image header stays."""
        assert self.config.boi_token_id is not None
        begins = ids.eq(self.config.boi_token_id).nonzero()
        if not len(begins):
            raise ValueError(f"a prefix lacks the image begin token {self.config.boi_token_id}; expected it once.")
        return torch.cat([ids.new_tensor(self.config.unconditional_prompt), ids[int(begins[-1]) :]])

    def null_condition(self, condition: Condition) -> Condition:
        assert isinstance(condition, Prompts)
        if self.config.unconditional_prompt is None:
            raise ValueError(
                "guidance needs the unconditional prefix of every sample; give unconditional=[ids, ...], or use "
                "cfg_scale=1."
            )
        return Prompts(self.null_prefix(ids) for ids in condition)

    def rope(self, plan: DecodePlan, prefix: Prefix) -> Rope:
        return self.rope_at(plan, prefix, prefix.lengths, plan.width + 1)

    def rope_at(self, plan: DecodePlan, prefix: Prefix, start: Tensor, row_stride: int) -> Rope:
        """1-D RoPE with the slot of (row, column) at start + row * row_stride + column; start (R,) int64."""
        if plan.n_slots > plan.n_cells and self.config.eol_token_id is None:
            raise ValueError("config.json has no eol_token_id; the raster plan needs it to end rows.")
        device = prefix.x.device
        column = torch.arange(len(prefix), device=device)
        in_prefix = (column - (len(prefix) - prefix.lengths)[:, None]).clamp_min(0)  # (R, P)
        slots = plan.on("row", device) * row_stride + plan.on("column", device)  # (S,)
        position = torch.cat([in_prefix, start[:, None] + slots], dim=1)  # (R, P + S)
        return rotations(angles_1d(position, self.config.head_dim, self.config.rope_base))

    @torch.no_grad()
    def token_logits(self, ids: list[Tensor]) -> list[Tensor]:
        """Causal text logits: for each 1-D id tensor (T,), (T, vocabulary) float32; row t predicts token t + 1."""
        if self.config.heads != "full":
            raise ValueError('token_logits scores the whole vocabulary; load the model with heads="full".')
        self.check_condition(ids)
        prefix = self.prefix(ids)
        plan = raster_plan(1, 1)
        rope = self.rope(plan, prefix)[:, : len(prefix)]
        x = self.layers(self.input_dropout(prefix.x), rope, self.attention_mask(plan, prefix, 0))
        x = self.norm(x)
        return [wide(self.head(row[len(prefix) - len(own) :])) for row, own in zip(x, ids)]
