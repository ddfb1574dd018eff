"""Any decoder over text tokens and image codes, by configuration: where its codes stand, and what its blocks are like.

Shapes: B samples, R rows, P prefix, S slots, D width, E head width, T token ids, V codes, C width of code vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from math import log
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flashar_pl.backbones.base import Backbone, initialise
from flashar_pl.backbones.condition import Condition, Given, Prefix, Prompts
from flashar_pl.backbones.decoder_config import DecoderConfig, Heads
from flashar_pl.backbones.families import PRESETS
from flashar_pl.grid import ROW_END, DecodePlan, raster_plan
from flashar_pl.layers.rope import Rope, angles_1d, angles_sections, rope_gain, rotations
from flashar_pl.layers.transformer import NORMS, Block, RMSNorm
from flashar_pl.numerics import wide


class CodeMLP(nn.Module):
    """Codes (R, n) to vectors (R, n, D): their own vectors (V, C), then linear layers with GELU between them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.code_width is not None
        self.vectors = nn.Embedding(config.n_codes, config.code_width)
        widths = [config.code_width, *[config.dim] * config.code_layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.layers[0](self.vectors(codes))
        for layer in list(self.layers)[1:]:
            x = layer(F.gelu(x))
        return x


class ProjectedNorm(RMSNorm):
    """The final norm and the first half of an MLP head: gelu(W norm(x) + b). The head's linear layer follows."""

    def __init__(self, dim: int, hidden: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.projection = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.projection(super().forward(x)))


def final_norm(config: DecoderConfig) -> nn.Module:
    """The norm before the head. With `logit_scale` its output is multiplied, and so are the logits of any head."""
    norm = NORMS[config.norm](config.dim, config.norm_eps)
    norm.scale = config.logit_scale
    return norm


class Decoder(Backbone):
    """A decoder that draws an image as tokens after a prompt; see `DecoderConfig`.

    Condition: a list of B 1-D id tensors, each the whole prefix of an image (prompt, image begin, size), of any
    lengths. Codes are 0-based; their place in the vocabulary is known here only. The embedding table always holds the
    whole vocabulary, for the prompts; `heads` concerns the output heads.

    Positions are those of pre-training: with a prefix of n tokens, the code of (row, column) stands at
    n + row * (W + 1) + column where every row ends with a token, else at n + row * W + column, each sample counted from
    its own prefix.
    """

    kind = "decoder"
    config_type: ClassVar[type | None] = DecoderConfig
    published: ClassVar[Mapping[str, Any]] = PRESETS
    homes: ClassVar[Mapping[str, str]] = {
        r"Emu3-Gen-hf": "https://huggingface.co/BAAI/Emu3-Gen-hf",
        r"Janus-Pro-1B": "https://huggingface.co/deepseek-community/Janus-Pro-1B",
        r"Janus-Pro-7B": "https://huggingface.co/deepseek-community/Janus-Pro-7B",
        r"Lumina-mGPT-7B-768": "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-768",
        r"SimpleAR-0\.5B": "https://huggingface.co/Daniel0724/SimpleAR-0.5B-RL",
        r"X-Omni-En": "https://huggingface.co/X-Omni/X-Omni-En",
        r"MammothModa2-Preview": "https://huggingface.co/bytedance-research/MammothModa2-Preview",
        r"GLM-Image-AR": "https://huggingface.co/zai-org/GLM-Image",
    }
    example: ClassVar[Mapping[str, Any]] = {
        "dim": 64, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 1300,
        "visual_token_offset": 1024, "norm_eps": 1e-6, "rope_base": 1e6, "heads": "visual", "qk_norm": "layer",
        "qkv_bias": True, "output_bias": True, "ffn_bias": True,
    }  # fmt: skip
    many_grids = True
    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.n_layer, self.vocabulary = config.dim, config.n_layer, config.n_codes
        self.first_code = config.full_rows - config.n_codes if config.heads == "full" and config.has_codes else 0
        self.row_ends = config.eol_token_id is not None
        self.conditioning, self.block = config.conditioning, config.block
        self.usual_grid = config.usual_grid or self.usual_grid
        self.published_cfg_scale = config.cfg_scale or self.published_cfg_scale
        self.code_pixels = config.code_pixels
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(map(self.make_block, range(config.n_layer)))
        if config.code_width is None:
            self.norm: nn.Module = final_norm(config)
            self.head = nn.Linear(config.dim, config.head_rows, bias=False)
        else:
            self.code_mlp = CodeMLP(config)
            hidden = config.code_hidden or config.dim
            self.norm = ProjectedNorm(config.dim, hidden, config.norm_eps)
            self.head = nn.Linear(hidden, config.n_codes)
        self.rest: dict[str, Tensor] = {}
        """What `from_transformers` was given beside this model (image encoders, a VQ), to be written back unchanged."""
        self.apply(initialise)

    @classmethod
    def training_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of the codes alone, and a tenth of the captions dropped, for guidance, where the unconditional prompt
        is known."""
        known = any(options.get(name) is not None for name in ("unconditional_prompt", "null_token_id"))
        return {"heads": "visual", "condition_dropout": 0.1 if known else 0.0}

    def make_block(self, layer: int = 0) -> nn.Module:
        block, config = super().make_block(layer), self.config
        assert isinstance(block, Block)
        if config.text_layers is not None and layer in range(*config.text_layers):
            block.text_passes = False
        if config.image_layers is not None and layer not in range(*config.image_layers):
            block.text_feed_forward = None
        return block

    def check_condition(self, given: Given, batch: int | None = None) -> Condition:
        found, first = super().check_condition(given, batch), self.config.first_image_token
        if self.config.text_layers is None or first is None:
            return found
        assert isinstance(found, Prompts)
        for ids in found:
            if ids.device.type == "cpu" and int(ids[-1]) < first:
                raise ValueError(
                    f"a prefix ends with token {int(ids[-1])}, which is text; expected one of images, from {first} on, "
                    "as text has a final norm of its own."
                )
        return found

    def to_transformers(self) -> dict[str, Tensor]:
        """The state dict that `from_transformers` read, under the same keys, bit-exact."""
        return resolve_name("flashar_pl.checkpoints.transformers:write_transformers")(self)

    @property
    def null_prompt(self) -> tuple[int, ...] | None:
        return self.config.unconditional_prompt

    @property
    def knows_null(self) -> bool:
        return self.config.knows_null

    def embed(self, codes: Tensor) -> Tensor:
        config = self.config
        if not config.has_codes:
            raise ValueError("config.json has neither visual_token_offset nor eoi_token_id; codes need one of them.")
        row_end = 0 if config.eol_token_id is None else config.eol_token_id  # `rope` refuses such plans
        if config.code_width is not None:
            x = self.code_mlp(codes.clamp_min(0))
            if config.eol_token_id is None:
                return x
            return torch.where((codes == ROW_END)[..., None], self.embedding(codes.new_full((1,), row_end)), x)
        return self.embedding(self._tokens(codes).masked_fill(codes == ROW_END, row_end))

    def _tokens(self, codes: Tensor) -> Tensor:
        """Token ids of codes that are tokens; of ROW_END any."""
        if self.config.code_ids is not None:
            return code_table(self.config.code_ids, codes.device)[codes.clamp_min(0)]
        assert self.config.visual_token_offset is not None
        return codes + self.config.visual_token_offset

    def input_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def prefix(self, condition: Given) -> Prefix:
        """Left-padded, so that image slots start at the same column in every row."""
        assert isinstance(condition, list)
        rows = self._drop_condition(condition)
        counts = [len(ids) for ids in rows]
        device = rows[0].device
        lengths = torch.tensor(counts, device=device)
        padded = pad_sequence(rows, batch_first=True, padding_side="left")
        x = self.embedding(padded)  # (R, P, D)
        previews = tuple(map(self.preview_length, rows)) if self.config.rope_sections else None
        first = self.config.first_image_token
        image = None if first is None else padded >= first
        if min(counts) == max(counts):
            return Prefix(x, lengths, None, previews, image)
        mask = torch.arange(max(counts), device=device) >= (max(counts) - lengths)[:, None]
        return Prefix(x, lengths, mask, previews, image)

    def preview_length(self, ids: Tensor) -> int:
        """Codes of a preview at the end of a prefix (T,): whatever follows the token that begins the image.

        Raises:
            ValueError: the prefix begins several images.
        """
        begins = ids.eq(-1 if self.config.boi_token_id is None else self.config.boi_token_id).nonzero()
        if len(begins) > 1:
            raise ValueError(f"a prefix begins {len(begins)} images; expected one: images to start from are not read.")
        return len(ids) - 1 - int(begins[0]) if len(begins) else 0

    def _drop_condition(self, condition: list[Tensor]) -> list[Tensor]:
        """In training, replace each sample's prompt by the unconditional one with probability `condition_dropout`."""
        if not self.training or self.config.condition_dropout == 0:
            return condition
        dropped = torch.rand(len(condition)) < self.config.condition_dropout
        return [self.null_prefix(ids) if drop else ids for ids, drop in zip(condition, dropped.tolist())]

    def null_prefix(self, ids: Tensor) -> Tensor:
        """The prefix (T,) with its prompt replaced by the unconditional one; the image header stays."""
        config = self.config
        assert config.boi_token_id is not None
        begins = ids.eq(config.boi_token_id).nonzero()
        if not len(begins):
            raise ValueError(f"a prefix lacks the image begin token {config.boi_token_id}; expected it once.")
        prompt, header = ids[: int(begins[-1])], ids[int(begins[-1]) :]
        if config.unconditional_prompt is not None:
            return torch.cat([ids.new_tensor(config.unconditional_prompt), header])
        assert config.null_token_id is not None
        return torch.cat([prompt[:1], torch.full_like(prompt[1:], config.null_token_id), header])

    def null_condition(self, condition: Condition) -> Condition:
        assert isinstance(condition, Prompts)
        if not self.knows_null:
            raise ValueError(
                "guidance needs the unconditional prefix of every sample; give unconditional=[ids, ...], or use "
                "cfg_scale=1."
            )
        return Prompts(self.null_prefix(ids) for ids in condition)

    def preview_grid(self, condition: Condition, grid: tuple[int, int]) -> tuple[int, int] | None:
        assert isinstance(condition, Prompts)
        if self.config.preview_side is None:
            return None
        begin = sum(int(ids[-1]) == self.config.boi_token_id for ids in condition)
        if 0 < begin < len(condition):
            raise ValueError(
                f"{begin} of {len(condition)} prompts have no preview yet, the others have one; expected all or none."
            )
        return self.config.preview(*grid) if begin else None

    def with_preview(self, condition: Condition, codes: Tensor) -> Condition:
        if self.config.preview_side is None:
            return super().with_preview(condition, codes)
        assert isinstance(condition, Prompts)
        return Prompts(torch.cat([ids, self._tokens(own.flatten().to(ids))]) for ids, own in zip(condition, codes))

    def rope(self, plan: DecodePlan, prefix: Prefix) -> Rope:
        config, sections = self.config, self.config.rope_sections
        if sections is None:
            return self.rope_at(plan, prefix, prefix.lengths, plan.width + self.row_ends)
        position = picture_positions(config, plan, prefix)  # (R, P + S, 3)
        return self._rotations(
            angles_sections(position, self._turning, config.rope_base, sections, config.rope_scaling)
        )

    def rope_at(self, plan: DecodePlan, prefix: Prefix, start: Tensor, row_stride: int) -> Rope:
        """1-D RoPE with the slot of (row, column) at start + row * row_stride + column; start (R,) int64."""
        if plan.n_slots > plan.n_cells and self.config.eol_token_id is None:
            raise ValueError("config.json has no eol_token_id; the raster plan needs it to end rows.")
        device = prefix.x.device
        slots = plan.on("row", device) * row_stride + plan.on("column", device)  # (S,)
        position = torch.cat([text_positions(prefix), start[:, None] + slots], dim=1)  # (R, P + S)
        rope = self._rotations(angles_1d(position, self._turning, self.config.rope_base, self.config.rope_scaling))
        if self.config.first_image_token is None:
            return rope
        code = torch.ones_like(position, dtype=rope.dtype)  # (R, P + S)
        code[:, : len(prefix)] = 0
        if prefix.image is not None:
            code[:, len(prefix) - prefix.image.shape[1] : len(prefix)] = prefix.image.to(rope.dtype)
        return torch.cat([rope, code[..., None, None].expand(-1, -1, 1, 2)], dim=-2)

    @property
    def _turning(self) -> int:
        return self.config.rope_width or self.config.head_dim

    def _rotations(self, angles: Tensor) -> Rope:
        """The rest of each head does not turn."""
        turned = rotations(angles) * rope_gain(self.config.rope_scaling)
        still = turned.new_zeros(*turned.shape[:2], self.config.head_dim // 2 - turned.shape[2], 2)
        still[..., 0] = 1
        return torch.cat([turned, still], dim=2)

    @torch.no_grad()
    def token_logits(self, ids: list[Tensor]) -> list[Tensor]:
        """Causal text logits: for each 1-D id tensor (T,), (T, vocabulary) float32; row t predicts token t + 1."""
        if self.config.heads != "full":
            raise ValueError('token_logits scores the whole vocabulary; load the model with heads="full".')
        if self.config.text_layers is not None:
            raise ValueError(
                "text of this model has a final norm of its own, which is not kept; codes alone are scored."
            )
        self.check_condition(ids)
        prefix = self.prefix(ids)
        plan = raster_plan(1, 1)
        rope = self.rope(plan, prefix)[:, : len(prefix)]
        x = self.layers(self.input_dropout(prefix.x), rope, self.attention_mask(plan, prefix, 0))
        x = self.norm(x)
        logits = [wide(self.head(row[len(prefix) - len(own) :])) for row, own in zip(x, ids)]
        if self.config.head_order is None:
            return logits
        by_token = torch.tensor(self.config.head_order, device=x.device).argsort()
        return [each[:, by_token] for each in logits]


def text_positions(prefix: Prefix) -> Tensor:
    """(R, P) int64: every position of a left-padded prefix, counted in its own row."""
    column = torch.arange(len(prefix), device=prefix.x.device)
    return (column - (len(prefix) - prefix.lengths)[:, None]).clamp_min(0)


def picture_positions(config: DecoderConfig, plan: DecodePlan, prefix: Prefix) -> Tensor:
    """(R, P + S, 3) int64: time, row and column of every position (GLM-Image, as `get_rope_index` of transformers).

    Text counts on all three axes; an image of h x w codes has one time t, rows t, t + 1, ... and columns t, t + 1, ...,
    and what follows goes on at t + max(h, w). The preview is such an image, and the one to draw the next.
    """
    device, codes = prefix.x.device, prefix.previews or (0,) * len(prefix.lengths)
    grids = [preview_grid(config, plan, n) if n else (0, 0) for n in codes]
    height, width = torch.tensor(grids, device=device).T[..., None]  # (R, 1) each
    position = text_positions(prefix)[..., None].repeat(1, 1, 3)  # (R, P, 3)
    text = prefix.lengths[:, None] - height * width  # (R, 1)
    inside = position[..., 0] - text  # (R, P), from 0 in a preview
    cell = torch.stack([0 * inside, inside // width.clamp_min(1), inside % width.clamp_min(1)], dim=-1)
    position = torch.where((inside >= 0)[..., None], text[..., None] + cell, position)
    start = text + torch.maximum(height, width)  # (R, 1)
    row, column = plan.on("row", device), plan.on("column", device)  # (S,)
    slots = start[..., None] + torch.stack([0 * row, row, column], dim=-1)  # (R, S, 3)
    return torch.cat([position, slots], dim=1)


def preview_grid(config: DecoderConfig, plan: DecodePlan, n: int) -> tuple[int, int]:
    """(h, w) of a preview of n codes of an image: the published size, else the one with the most similar sides.

    Raises:
        ValueError: no h x w = n is a preview of such an image.
    """
    usual = config.preview(plan.height, plan.width)
    if usual is not None and usual[0] * usual[1] == n:
        return usual

    def apart(h: int) -> float:
        return abs(log(h / (n // h) * plan.width / plan.height))

    best = min((h for h in range(1, n + 1) if n % h == 0), key=apart)
    if apart(best) > log(2):
        raise ValueError(
            f"a prefix has {n} tokens after the begin of its image; expected none, or the codes of a preview of "
            f"{plan.height}x{plan.width}{'' if usual is None else f', such as {usual[0]}x{usual[1]}'}."
        )
    return best, n // best


@lru_cache(maxsize=64)
def code_table(code_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """(V,) int64: the token id of every code."""
    return torch.tensor(code_ids, device=device)


def from_transformers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], heads: Heads = "full") -> Decoder:
    """A decoder from the state dict of a `transformers` model and its config.json, whose `model_type` picks the family.

    Where codes are tokens and config.json does not say which, it may hold `visual_token_offset`, `num_visual_codes`,
    `eol_token_id` (none = no row ends) and `boi_token_id` beside what it has.

    Args:
        state_dict: names and tensors; those of image encoders and decoders are kept aside, see `Decoder.rest`.
        config: content of config.json.
        heads: see `DecoderConfig`; a family whose codes are no tokens always has "visual".

    Raises:
        ValueError: an unknown model_type, a feature that decoders lack; missing, unknown or misshapen tensors.
    """
    return resolve_name("flashar_pl.checkpoints.transformers:read_transformers")(state_dict, config, heads)
