"""LlamaGen (Sun et al., 2024): raster autoregressive transformers over VQ codes, class- and text-conditional.

Shapes: R rows, P prefix (1 class token or T text positions), S slots, D width, E head width, C caption width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, check_dropout, initialise
from flashar_pl.backbones.condition import ClassIds, Condition, Conditioning, Given, Prefix, TextFeatures, as_condition
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.rope import Rope, angles_2d, rotations
from flashar_pl.layers.transformer import BlockConfig, RMSNorm


@dataclass(frozen=True)
class LlamaGenConfig:
    """Everything that defines a LlamaGen model."""

    dim: int
    """Width D."""
    n_layer: int
    """Number of blocks L."""
    n_head: int
    """Query heads."""
    n_kv_head: int | None = None
    """Key/value heads; None = n_head."""
    vocab_size: int = 16384
    """Number of codes V."""
    condition: Literal["class", "text"] = "class"
    """Class ids, or features of a text encoder read from files."""
    num_classes: int = 1000
    """Classes; class id num_classes is the null class."""
    caption_dim: int = 2048
    """Width C of the text features."""
    caption_positions: int = 120
    """Largest number of caption positions; the null caption has as many. The published models have 120."""
    multiple_of: int = 256
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Scales the feed-forward width before rounding; None = 1."""
    ffn_dim: int | None = None
    """Feed-forward width; None = 8/3 of dim, scaled and rounded as above."""
    rope_base: float = 10000.0
    """Base of the RoPE frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    token_dropout: float = 0.1
    """Dropout on the embedded sequence."""
    attn_dropout: float = 0.0
    """Dropout on attention probabilities."""
    resid_dropout: float = 0.1
    """Dropout after the attention output projection."""
    ffn_dropout: float = 0.1
    """Dropout after the feed-forward output projection."""
    condition_dropout: float = 0.1
    """Probability that a training sample sees the null condition instead of its own."""

    def __post_init__(self) -> None:
        if self.dim % self.n_head or (self.dim // self.n_head) % 4:
            raise ValueError(
                f"dim {self.dim} over n_head {self.n_head}: the head width must be a whole multiple of 4 (2-D RoPE)."
            )
        if self.condition not in ("class", "text"):
            raise ValueError(f'condition is {self.condition!r}; expected "class" or "text".')
        check_dropout(self)

    @property
    def feed_forward_dim(self) -> int:
        """Feed-forward width F."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def conditioning(self) -> Conditioning:
        """What the model is conditioned on."""
        if self.condition == "class":
            return Conditioning("class", self.num_classes)
        return Conditioning("text", self.caption_dim, self.caption_positions)

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        kv, width = self.n_kv_head or self.n_head, self.dim // self.n_head
        return BlockConfig.of(self, n_kv_head=kv, head_dim=width, ffn_dim=self.feed_forward_dim)


PRESETS: dict[str, LlamaGenConfig] = {
    "llamagen-b": LlamaGenConfig(dim=768, n_layer=12, n_head=12),  # 110,888,448 parameters
    "llamagen-l": LlamaGenConfig(dim=1024, n_layer=24, n_head=16),  # 342,910,976
    "llamagen-xl": LlamaGenConfig(dim=1280, n_layer=36, n_head=20),  # 774,699,520
    "llamagen-xxl": LlamaGenConfig(dim=1536, n_layer=48, n_head=24),  # 1,410,972,672
    "llamagen-3b": LlamaGenConfig(dim=3200, n_layer=24, n_head=32),  # 3,096,659,200
    "llamagen-xl-t2i": LlamaGenConfig(dim=1280, n_layer=36, n_head=20, condition="text"),  # 777,678,080
}
"""Published sizes (LlamaGen, Tab. 1); parameter counts for 16,384 codes and 1,000 classes."""


class ClassEmbedding(nn.Module):
    """One prefix token per class id; the last row is the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)[:, None]  # (R, 1, D)


class CaptionEmbedding(nn.Module):
    """A two-layer MLP on text features, and the null caption (a constant of the checkpoint, never trained)."""

    null: Tensor

    def __init__(self, caption_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.register_buffer("null", torch.randn(positions, caption_dim) / caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))  # (R, T, D)


class LlamaGen(Backbone):
    """A LlamaGen model; see `LlamaGenConfig`. Condition: class ids (B,) int64, or `TextFeatures`."""

    kind = "llamagen"
    config_type, published = LlamaGenConfig, PRESETS
    homes: ClassVar = {r"c2i_(B|L|XL|XXL|3B)_(256|384)\.pt": "https://huggingface.co/FoundationVision/LlamaGen"}
    example: ClassVar = {
        "dim": 64, "n_layer": 3, "n_head": 4, "multiple_of": 32, "vocab_size": 256, "num_classes": 10,
        "resid_dropout": 0.0, "ffn_dropout": 0.0, "token_dropout": 0.0, "condition_dropout": 0.0,
    }  # fmt: skip
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.n_layer, self.vocabulary = config.dim, config.n_layer, config.vocab_size
        self.conditioning, self.block = config.conditioning, config.block
        self.condition_embedding: ClassEmbedding | CaptionEmbedding
        if config.condition == "class":
            self.condition_embedding = ClassEmbedding(config.num_classes, config.dim)
        else:
            self.condition_embedding = CaptionEmbedding(config.caption_dim, config.dim, config.caption_positions)
        self.code_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(initialise)
        nn.init.zeros_(self.head.weight)  # uniform logits at step 0: loss = ln V

    @classmethod
    def data_options(cls, vocabulary: int, classes: int | None) -> dict[str, int]:
        return {"vocab_size": vocabulary} | ({} if classes is None else {"num_classes": classes})

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], n_head: int, *, rope_base: float = 10000.0, norm_eps: float = 1e-5
    ) -> LlamaGen:
        """A model from an official LlamaGen state dict; every size but `n_head` is read from the tensors.

        Missing, unknown or misshapen keys raise ValueError.
        """
        read = resolve_name("flashar_pl.checkpoints.llamagen:read_official")
        return read(state_dict, n_head, rope_base=rope_base, norm_eps=norm_eps)

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, bit-exact inverse of `from_official`."""
        return resolve_name("flashar_pl.checkpoints.llamagen:write_official")(self)

    def embed(self, codes: Tensor) -> Tensor:
        return self.code_embedding(codes)

    def input_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.token_dropout, self.training)

    def prefix(self, condition: Given) -> Prefix:
        condition = as_condition(condition)
        if isinstance(condition, TextFeatures):
            features = self._drop_condition(condition.features, self._null_caption(condition.features.shape[1]))
            x = self.condition_embedding(features.to(self.code_embedding.weight.dtype))
            mask = None if condition.mask is None else condition.mask.bool()
            lengths = torch.full((len(x),), x.shape[1], device=x.device) if mask is None else mask.sum(1)
            return Prefix(x, lengths, mask)
        assert isinstance(condition, ClassIds)
        null = condition.ids.new_full((), self.config.num_classes)  # filled there: no copy to wait for
        ids = self._drop_condition(condition.ids, null)
        return Prefix(self.condition_embedding(ids), torch.ones_like(ids))

    def _drop_condition(self, condition: Tensor, null: Tensor) -> Tensor:
        """In training, replace each sample's condition by `null` with probability `condition_dropout`."""
        if not self.training or self.config.condition_dropout == 0:
            return condition
        dropped = torch.rand(condition.shape[0], device=condition.device) < self.config.condition_dropout
        return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), null.to(condition.dtype), condition)

    def _null_caption(self, positions: int) -> Tensor:
        assert isinstance(self.condition_embedding, CaptionEmbedding)
        return self.condition_embedding.null[:positions]

    def null_condition(self, condition: Condition) -> Condition:
        if isinstance(condition, TextFeatures):
            null = self._null_caption(condition.features.shape[1]).to(condition.features.dtype)
            return TextFeatures(null.expand_as(condition.features), condition.mask)
        assert isinstance(condition, ClassIds)
        return ClassIds(torch.full_like(condition.ids, self.config.num_classes))

    def rope(self, plan: DecodePlan, prefix: Prefix) -> Rope:
        """2-D positions (row, column) per slot; the prefix rows of the table are zero, as in LlamaGen."""
        device, head_dim = prefix.x.device, self.block.head_dim
        angles = angles_2d(plan.on("row", device), plan.on("column", device), head_dim, self.config.rope_base)
        return torch.cat([angles.new_zeros(len(prefix), head_dim // 2, 2), rotations(angles)])[None]
