"""What a decoder is, as data: sizes, norms, biases, and where its codes stand.

Letters: D width, E head width, V codes, C width of code vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, Literal

from flashar_pl.backbones.base import check_dropout
from flashar_pl.backbones.condition import Conditioning
from flashar_pl.layers.rope import SCALINGS
from flashar_pl.layers.transformer import BlockConfig, NormKind, NormPlace, QKNorm

Heads = Literal["full", "visual"]
MORE = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
"""Numbers of a scaled RoPE that may be given."""


def _is_usable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 <= value <= 1e9


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that defines a decoder. The vocabulary holds text tokens, and the codes unless they have their own
    vectors (`code_width`)."""

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
    """Text tokens, and the codes where they are tokens."""
    rope_base: float
    """Base of the RoPE frequencies."""
    norm_eps: float
    """Added to the mean square, or to the variance, in norms."""
    visual_token_offset: int | None = None
    """Token id of code 0; the others follow. None = unknown, text only."""
    eol_token_id: int | None = None
    """Token id of the row end that the raster plan forces after every row but the last; None = no row ends."""
    boi_token_id: int | None = None
    """Token id that begins an image. From here on the unconditional prefix equals the conditional one."""
    heads: Heads = "full"
    """"full": the heads score the whole vocabulary, and losses are normalised over it. "visual": codes only."""
    dropout: float = 0.0
    """Dropout on the embedded sequence, attention probabilities and both residual branches."""
    condition_dropout: float = 0.0
    """Probability that a training sample sees the unconditional prompt instead of its own."""
    unconditional_prompt: tuple[int, ...] | None = None
    """Token ids of the unconditional prompt, up to the begin of the image; None = guidance needs it given."""
    num_visual_codes: int | None = None
    """Number of codes V; None = as many as token ids from `visual_token_offset` on."""
    code_ids: tuple[int, ...] | None = None
    """Token id of every code, where they do not follow one another."""
    qk_norm: QKNorm = "none"
    """Norm of each head's query and key."""
    norm: NormKind = "rms"
    """Norms of the blocks, and the final one: RMSNorm, or LayerNorm with weight and bias."""
    norm_place: NormPlace = "before"
    """Norms before attention and feed-forward, after them, or both."""
    activation: str = "silu"
    """Of the feed-forward's gate: silu, gelu, gelu_tanh or relu."""
    logit_scale: float = 1.0
    """What the logits are multiplied by: the final norm's output is, before the head."""
    qkv_bias: bool = False
    """Biases of queries, keys and values."""
    output_bias: bool = False
    """A bias of the attention's output projection."""
    ffn_bias: bool = False
    """Biases of the feed-forward projections."""
    rope_interleaved: bool = False
    """Pairs that turn together: (2i, 2i + 1) if true, (i, i + half of what turns) otherwise."""
    rope_scaling: Mapping[str, Any] | None = None
    """`rope_parameters` of config.json where RoPE is scaled: `rope_type` linear, llama3 or yarn, and its numbers."""
    rope_width: int | None = None
    """Dimensions of each head that turn, the first ones of the published weights; None = all."""
    rope_sections: tuple[int, ...] | None = None
    """Pairs of them that turn with time, row and column, in turn (M-RoPE); codes then stand at their row and column.
    None = every position is one number."""
    first_image_token: int | None = None
    """First of the token ids of images, which have a feed-forward of their own in every block (MammothModa2), or blocks
    of their own (`text_layers`); None = all tokens have the same."""
    image_layers: tuple[int, int] | None = None
    """Blocks [begin, end) that have it; in others all tokens have the same. None = all."""
    text_layers: tuple[int, int] | None = None
    """Blocks [begin, end) that text goes through; others see it and leave it as it is, and its final norm, another one,
    is not kept (X-Omni). None = all."""
    text_rows: int | None = None
    """Rows of their embedding and head of text, where those of images are tensors of their own; None = they are not."""
    preview_side: int | None = None
    """Side of the smaller image that is drawn first, for a square one: of (H, W) codes it has side * sqrt(H / W) x
    side * sqrt(W / H), rounded down, but at least 1; None = there is none."""
    code_width: int | None = None
    """Width C of vectors that codes have beside the vocabulary, brought to D by an MLP, and scored by an MLP (Janus);
    None = codes are tokens."""
    code_layers: int = 2
    """Linear layers of the MLP that embeds codes."""
    code_hidden: int | None = None
    """Width of the MLP that scores codes; None = D."""
    model_type: str = "llama"
    """Family whose names `to_transformers` gives."""
    text_prefix: str = "model."
    """What stands before their names of the language model."""
    head_size: int | None = None
    """Rows of their head, where that is not the whole vocabulary; None = it is."""
    head_key: str = "lm_head.weight"
    """Their name of the head, where codes are tokens."""
    tied_head: bool = False
    """Whether their state dict has no head, because it is the embedding."""
    null_token_id: int | None = None
    """Token that stands in the unconditional prompt for every token of a prompt but its first (Janus)."""
    usual_grid: tuple[int, int] | None = None
    """(H, W) where nothing else is known; None = that of the class."""
    cfg_scale: float | None = None
    """Guidance that the published weights need; None = that of the class."""
    code_pixels: int = 16
    """Pixels of a code along each side."""

    def __post_init__(self) -> None:
        names = ("unconditional_prompt", "code_ids", "usual_grid", "rope_sections", "image_layers", "text_layers")
        for name in names:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.knows_null and self.boi_token_id is None:
            raise ValueError("unconditional_prompt is given and boi_token_id is not; expected both.")
        if self.heads not in ("full", "visual"):
            raise ValueError(f'heads is {self.heads!r}; expected "full" or "visual".')
        check_dropout(self)
        if self.condition_dropout and not self.knows_null:
            raise ValueError("condition_dropout needs unconditional_prompt, the token ids that replace a prompt.")
        self._check_rope()
        self._check_codes()

        drawn = [id for id in (self.visual_token_offset, *(self.code_ids or ()), self.eol_token_id) if id is not None]
        if self.first_image_token is not None and min(drawn, default=self.first_image_token) < self.first_image_token:
            raise ValueError(
                f"codes and row ends are tokens from {min(drawn)} on; expected those of images, from "
                f"{self.first_image_token} on."
            )

    def _check_rope(self) -> None:
        turning, sections = self.rope_width or self.head_dim, self.rope_sections
        partly = self.rope_width not in (None, self.head_dim) and not self.rope_interleaved
        if (scaling := self.rope_scaling) is not None:
            needed = SCALINGS.get(str(scaling.get("rope_type")))
            if needed is None:
                raise ValueError(f"rope_type is {scaling.get('rope_type')!r}; expected one of {', '.join(SCALINGS)}.")
            given = [scaling.get(name) for name in needed] + [scaling[name] for name in MORE if scaling.get(name)]
            flat = scaling.get("low_freq_factor", 0) == scaling.get("high_freq_factor", 1)
            if flat or self.rope_base <= 1 or not all(map(_is_usable, given)):
                raise ValueError(
                    f"{dict(scaling)} scales RoPE of base {self.rope_base:g}; expected a base above 1 and numbers from "
                    f"1e-6 to 1e9 as {', '.join(needed)}."
                )
        if turning % 2 or turning > self.head_dim or (partly and self.qk_norm != "none"):
            raise ValueError(
                f"{turning} dimensions of each head turn (partial_rotary_factor); expected an even number up to "
                f"{self.head_dim}, and no norms of queries and keys unless all of them do."
            )
        if sections is not None and sum(sections) != turning // 2:
            raise ValueError(f"mrope_section is {list(sections)}; expected {turning // 2} in all, pairs that turn.")

    def _check_codes(self) -> None:
        if self.code_width is not None:
            if self.norm != "rms" or self.logit_scale != 1:
                raise ValueError("codes with their own vectors need RMSNorm and logits that are not scaled.")
            if self.heads == "full" or self.num_visual_codes is None:
                raise ValueError('codes with their own vectors need heads="visual" and num_visual_codes.')
            return
        if self.visual_token_offset is not None and self.code_ids is not None:
            raise ValueError("visual_token_offset and code_ids are given; expected one of them.")
        if self.visual_token_offset is None and self.code_ids is None and self.heads == "visual":
            raise ValueError('heads="visual" needs visual_token_offset (or eoi_token_id in config.json).')
        first, last = self.visual_token_offset, self.full_rows - 1
        if first is not None and not 0 <= first <= last:
            raise ValueError(f"visual_token_offset is {first}; expected 0 to {last}.")
        if first is not None and not 0 < self.n_codes <= last + 1 - first:
            left = last + 1 - first
            raise ValueError(f"num_visual_codes is {self.n_codes}; expected 1 to {left}, the tokens from {first} on.")
        ids = self.code_ids or ()
        if len({*ids}) < len(ids) or not all(0 <= token <= last for token in ids):
            raise ValueError(f"code_ids are not {len(ids)} different token ids from 0 to {last}.")

    @property
    def knows_null(self) -> bool:
        """Whether it is known what guidance leads away from."""
        return self.unconditional_prompt is not None or self.null_token_id is not None

    @property
    def has_codes(self) -> bool:
        """Whether it is known where codes are."""
        return self.code_width is not None or self.code_ids is not None or self.visual_token_offset is not None

    @property
    def n_codes(self) -> int:
        """Number of codes V; 0 if their place in the vocabulary is unknown."""
        if self.code_ids is not None:
            return len(self.code_ids)
        if self.num_visual_codes is not None:
            return self.num_visual_codes
        return 0 if self.visual_token_offset is None else self.full_rows - self.visual_token_offset

    @property
    def full_rows(self) -> int:
        """Rows of a head that scores all that theirs does."""
        return self.head_size or self.vocab_size

    @property
    def head_rows(self) -> int:
        """Rows of each head."""
        return self.full_rows if self.heads == "full" else self.n_codes

    def preview(self, height: int, width: int) -> tuple[int, int] | None:
        """Grid of the preview of an image of (height, width) codes; None = there is none."""
        if self.preview_side is None:
            return None
        ratio = height / width
        return max(1, int(sqrt(ratio) * self.preview_side)), max(1, int(sqrt(1 / ratio) * self.preview_side))

    @property
    def rope_order(self) -> tuple[int, ...] | None:
        """Their dimension of every dimension of a head. Ours turn in pairs (i, i + E / 2), theirs in pairs
        (i, i + rope_width / 2): those that do not turn stand between. None = the same."""
        turning, width = self.rope_width, self.head_dim
        if turning is None or turning == width or self.rope_interleaved:
            return None
        half, still = turning // 2, (width - turning) // 2
        parts = ((0, half), (turning, still), (half, half), (turning + still, still))
        return tuple(begin + i for begin, n in parts for i in range(n))

    @cached_property
    def head_order(self) -> tuple[int, ...] | None:
        """Token id of every row of a full head: what is no code, then the codes. None = rows are token ids."""
        if self.code_width is not None or not self.has_codes:
            return None
        first, rows = self.visual_token_offset or 0, range(self.full_rows)
        codes = self.code_ids or tuple(range(first, first + self.n_codes))
        known = {*codes}
        order = (*(token for token in rows if token not in known), *codes)
        return None if order == tuple(rows) else order

    @property
    def conditioning(self) -> Conditioning:
        """What the model is conditioned on."""
        usual = 50  # tokens of a prompt, the image prefix included
        if self.usual_grid is not None and (smaller := self.preview(*self.usual_grid)) is not None:
            usual += smaller[0] * smaller[1]
        last = None if self.text_layers is None else self.first_image_token
        previews = self.preview_side is not None
        return Conditioning("prompt", self.vocab_size, usual, self.visual_token_offset, previews, last)

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        dropout = dict.fromkeys(("attn_dropout", "resid_dropout", "ffn_dropout"), self.dropout)
        text = {"text_ffn": self.first_image_token is not None, "text_passes": False}
        if self.text_layers is not None:
            text = {"text_ffn": False, "text_passes": True}
        return BlockConfig.of(self, **text, **dropout)
