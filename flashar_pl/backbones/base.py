"""What every backbone is to the rest of the package.

Shapes: B samples, R rows of a forward (B, or 2B with guidance), P prefix length, S slots of a plan, D width,
V codes, K = P + S.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashar_pl.backbones.condition import (
    KINDS,
    Batch,
    ClassIds,
    Condition,
    Conditioning,
    Given,
    Prefix,
    as_condition,
    kind_of,
)
from flashar_pl.console import closest
from flashar_pl.grid import ROW_END, DecodePlan, raster_plan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.layers.transformer import Block, BlockConfig, Mask, run_blocks
from flashar_pl.numerics import wide
from flashar_pl.options import SamplingSettings

NUMBERS: dict[str, Any] = {"int": int, "float": int | float, "<class 'int'>": int, "<class 'float'>": int | float}
"""Annotations of options whose values are checked before arithmetic is done with them."""


class Backbone(nn.Module, ABC):
    """A decoder-only transformer over codes. The grid is never part of it; a `DecodePlan` brings it.

    Layers run on the sequence [prefix | slots of the plan in plan order]; FlashAR forks them at any index. The head
    is a plain attribute once a FlashAR model owns it (`release_head`); it is used the same way before and after.
    """

    kind: ClassVar[str]
    """Name under which `build_backbone` finds this class."""
    config_type: ClassVar[type | None] = None
    """Dataclass of all options, the constructor's only argument; None = the constructor takes the options."""
    published: ClassVar[Mapping[str, Any]] = {}
    """Published sizes by name, each a `config_type`."""
    homes: ClassVar[Mapping[str, str]] = {}
    """Where files of published weights are: the address by a pattern of file names."""
    published_cfg_scale: float | None = None
    """Guidance that the published weights need to draw well; None = they do without."""
    own_model: ClassVar[str | None] = None
    """Kind of model that alone can run it; None = every kind."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Options of a tiny one, with which a machine is checked."""
    usual_grid: tuple[int, int] = (16, 16)
    """(H, W) where nothing else is known."""
    code_pixels: int = 16
    """Pixels of a code along each side, where images are asked for in pixels."""
    many_grids: ClassVar[bool] = False
    """Whether the published weights were trained on images of many shapes."""
    usual_clones: ClassVar[int] = 1
    """Layers that the vertical branch clones where nothing else is said (the paper: the last one)."""
    config: Any
    """A `config_type`, where there is one."""
    dim: int
    """Width D."""
    n_layer: int
    """Number of blocks L."""
    vocabulary: int
    """Number of codes V."""
    first_code: int = 0
    """Row of the head that scores code 0; more than 0 if the head also scores text tokens."""
    conditioning: Conditioning
    """What kind of condition it takes, and of which sizes."""
    row_ends: bool = False
    """Whether the raster plan of this backbone has forced row-end tokens."""
    block: BlockConfig
    """Sizes of one block."""
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    # --- options ----------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> dict[str, Any]:
        """Options of a published size, some of them changed. ValueError for an unknown name or option."""
        if name not in cls.published:
            raise ValueError(f"no preset {name!r}; {closest(name, cls.published)}")
        options = {**plain(asdict(cls.published[name])), **overrides}
        cls.check_options(options)
        return options

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """ValueError for an option that is unknown, missing, or no number where one is expected."""
        known = {
            name: each
            for name, each in inspect.signature(cls.config_type or cls).parameters.items()
            if each.kind is each.POSITIONAL_OR_KEYWORD or each.kind is each.KEYWORD_ONLY
        }
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"a {cls.kind} backbone has no option {name!r}; {closest(name, known)}")
            expected = NUMBERS.get(str(known[name].annotation))
            if expected is not None and (isinstance(value, bool) or not isinstance(value, expected)):
                kind = "a whole number" if expected is int else "a number"
                raise ValueError(f"{name} is {value!r}; expected {kind}.")
        missing = [name for name, each in known.items() if each.default is each.empty and name not in options]
        if missing:
            example = f", or for example the preset {next(iter(cls.published))}" if cls.published else ""
            raise ValueError(f"a {cls.kind} backbone needs {', '.join(missing)}{example}.")

    @classmethod
    def training_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a training run changes unless it says otherwise."""
        return {}

    @classmethod
    def data_options(cls, vocabulary: int, classes: int | None) -> dict[str, Any]:
        """Options that follow from the data of a model of no published size: V codes, and classes if it has such."""
        return {}

    def config_dict(self) -> dict[str, Any]:
        """Plain types from which `build_backbone` makes an equal backbone: its kind and all options."""
        assert self.config_type is not None, "a backbone without a config_type has its own config_dict"
        return {"kind": self.kind, **plain(asdict(self.config))}

    # --- layers -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, codes: Tensor) -> Tensor:
        """Codes (R, n) int64, ROW_END for a row-end token -> (R, n, D)."""

    @abstractmethod
    def prefix(self, condition: Condition) -> Prefix:
        """The embedded condition. In training mode it applies the label or caption dropout."""

    @abstractmethod
    def null_condition(self, condition: Condition) -> Condition:
        """What guidance leads away from, for each sample of `condition`. ValueError if the model does not know it."""

    @abstractmethod
    def rope(self, plan: DecodePlan, prefix: Prefix) -> Rope:
        """The rotation of every position, (1 or R, P + S, E / 2, 2) float32."""

    def make_block(self, layer: int = 0) -> nn.Module:
        """A new block of this backbone's sizes, for its `layer` and for branches that clone that."""
        block = Block(self.block)
        block.apply(initialise)
        return block

    def cache_spec(self, extra_layers: int = 0) -> CacheSpec:
        """What a KV cache must hold, with `extra_layers` for branches."""
        return CacheSpec(self.n_layer + extra_layers, self.block.n_kv_head, self.block.head_dim)

    def condition_linears(self) -> dict[str, nn.Linear]:
        """Projections outside of blocks and head, by name: those that embed the condition."""
        inner = {id(module) for module in (*self.blocks.modules(), self.head)}
        found = [(name, m) for name, m in self.named_modules() if isinstance(m, nn.Linear) and id(m) not in inner]
        return dict(found)

    # --- conditions -------------------------------------------------------------------------------------------------

    @property
    def null_prompt(self) -> tuple[int, ...] | None:
        """Token ids of the prompt that guidance leads away from; None = not known, or no prompts."""
        return None

    @property
    def knows_null(self) -> bool:
        """Whether guidance works without an unconditional condition from the caller."""
        return self.conditioning.kind != "prompt" or self.null_prompt is not None

    def guided(self, settings: SamplingSettings) -> bool:
        """Whether these settings need a second, unconditional row."""
        return settings.guided

    def notes(self, condition: Condition, guided: bool) -> list[str]:
        """What a user who asks for these samples may not have meant."""
        found = []
        if self.published_cfg_scale is not None and not guided:
            scale = f"{self.published_cfg_scale:g}"
            found.append(f"drawn without guidance; {self.kind} models are published with --cfg-scale {scale}.")
        null = self.conditioning.size
        if isinstance(condition, ClassIds) and bool((condition.ids == null).any()):
            found.append(f"class {null} means no class, what guidance leads away from; classes are 0 to {null - 1}.")
        return found

    def check_condition(self, given: Given, batch: int | None = None) -> Condition:
        """What a caller gave, as a condition of this backbone.

        Raises:
            ValueError: it is of the wrong kind, out of range, or not of `batch` samples.
        """
        found, wanted = as_condition(given), KINDS[self.conditioning.kind]
        if not isinstance(found, wanted):
            raise ValueError(f"this model {wanted.words}, got {kind_of(given)}.")
        found.check(self.conditioning)
        if batch is not None and len(found) != batch:
            raise ValueError(f"the condition has {len(found)} samples; expected {batch}, one per sample.")
        return found

    def with_unconditional(self, condition: Given, unconditional: Given | None) -> Condition:
        """The conditions of 2B rows: the given ones, then the unconditional ones (None = the model's own)."""
        own = as_condition(condition)
        return Condition.cat([own, self.null_condition(own) if unconditional is None else as_condition(unconditional)])

    def preview_grid(self, condition: Condition, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Grid of a smaller image that is drawn first and then stands in the prefix; None = there is none to draw, as
        where one of these conditions has it already."""
        return None

    def with_preview(self, condition: Condition, codes: Tensor) -> Condition:
        """The condition with the codes (B, h, w) of that image. Raises ValueError for a model that draws none."""
        raise ValueError(f"this {self.kind} model draws no preview before an image; expected a batch without previews.")

    def condition_of(self, batch: Batch) -> Condition:
        """What the images of a batch are conditioned on, its previews included."""
        return batch.condition if batch.previews is None else self.with_preview(batch.condition, batch.previews)

    # --- sequences --------------------------------------------------------------------------------------------------

    def input_dropout(self, x: Tensor) -> Tensor:
        """Dropout on the embedded sequence (R, L, D); none by default."""
        return x

    def release_head(self) -> nn.Linear:
        """Hand the head over to another module: it stays usable here, but its parameters are registered there."""
        head = self.head
        if "head" in dict(self.named_children()):
            del self.head
            object.__setattr__(self, "head", head)
        return head

    def layers(
        self,
        x: Tensor,
        rope: Rope,
        mask: Mask = None,
        cache: KVCache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks start..stop-1 (Eq. 4, 5) on x (R, L, D)."""
        return run_blocks(list(self.blocks)[start:stop], x, rope, mask, cache, start)

    def sequence_mask(self, plan: DecodePlan, prefix: Prefix, n_slots: int) -> Tensor:
        """(1 or R, 1, K, K) bool mask of the prefix and the first `n_slots` slots, K = P + n_slots.

        Padded prefix positions are hidden from everyone but themselves, so that no row of the softmax is empty.
        """
        return hide_padding(plan_mask(plan, len(prefix), n_slots, prefix.x.device), prefix)

    def attention_mask(self, plan: DecodePlan, prefix: Prefix, n_slots: int) -> Mask:
        """`sequence_mask`, or "causal" where that says the same: a plan in raster order, and no row is padded."""
        if prefix.mask is None and (n_slots == 0 or is_causal(plan)):
            return "causal"
        return self.sequence_mask(plan, prefix, n_slots)

    @torch.no_grad()
    def raster_logits(self, codes: Tensor, condition: Given) -> Tensor:
        """Teacher-forced raster logits (B, H, W, V) float32; [b, p, q] predicts codes[b, p, q] (Eq. 1).

        codes (B, H, W) int64; every code must lie in [0, V).
        """
        check_codes(codes, self.vocabulary)
        found = self.check_condition(condition, codes.shape[0])
        plan = raster_plan(codes.shape[1], codes.shape[2], row_end=self.row_ends)
        prefix = self.prefix(found)
        x = self.input_dropout(torch.cat([prefix.x, self.embed(slot_codes(codes, plan))], dim=1))
        x = self.layers(x, self.rope(plan, prefix), self.attention_mask(plan, prefix, plan.n_slots))
        x = self.norm(x)[:, len(prefix) - 1 :]  # (B, 1 + S, D)
        logits = wide(self.head(x))[..., self.first_code :]  # (B, 1 + S, V)
        logits = logits[:, plan.on("h_source", x.device) + 1]  # (B, N, V)
        return logits.unflatten(1, codes.shape[1:])


def hide_padding(mask: Tensor, prefix: Prefix) -> Tensor:
    """(1 or R, 1, L, K) bool of `mask` (L, K) for the last L of K positions, of which the prefix is the first P: keys
    that only pad it are hidden from everyone but themselves."""
    if prefix.mask is None:
        return mask[None, None]
    visible = torch.ones(prefix.x.shape[0], mask.shape[1], dtype=torch.bool, device=mask.device)
    visible[:, : len(prefix)] = prefix.mask
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[-mask.shape[0] :]
    return ((mask & visible[:, None]) | itself)[:, None]


def plan_mask(plan: DecodePlan, prefix: int, n_slots: int, device: torch.device) -> Tensor:
    """The upper left part of `plan.mask(prefix)`, up to slot `n_slots`: (K, K) bool, K = prefix + n_slots.

    Made on the device by one comparison, so prompts of any length cost the same and nothing need be kept.
    """
    if isinstance(plan.visible, Tensor) and not is_causal(plan):
        return plan.mask(prefix)[: prefix + n_slots, : prefix + n_slots].to(device)
    turn = torch.arange(prefix + n_slots, device=device)  # when a position enters: the prefix one by one
    if not isinstance(plan.visible, Tensor):
        turn[prefix:] = prefix + plan.on("slot_step", device)[:n_slots]
    return turn[:, None] >= turn


@lru_cache(maxsize=64)
def is_causal(plan: DecodePlan) -> bool:
    """Whether every slot sees exactly the slots up to its own."""
    return bool(torch.equal(plan.slot_mask, torch.ones_like(plan.slot_mask).tril()))


def slot_codes(codes: Tensor, plan: DecodePlan) -> Tensor:
    """Codes (B, H, W) in slot order (B, S), ROW_END where the slot is a row end."""
    cell = plan.on("cell", codes.device)
    return codes.flatten(1)[:, cell].long().masked_fill(cell < 0, ROW_END)


def check_codes(codes: Tensor, vocabulary: int) -> None:
    """ValueError unless codes are (B, H, W) integers. The range is checked where that costs no synchronisation."""
    if not isinstance(codes, Tensor):
        raise ValueError(f"codes are a {type(codes).__name__}; expected a tensor (B, H, W) of integers.")
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(f"codes have shape {tuple(codes.shape)}, dtype {codes.dtype}; expected (B, H, W) integers.")
    if codes.device.type == "cpu" and codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"codes range from {low} to {high}; expected 0 to {vocabulary - 1} (the vocabulary).")


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for linear and embedding weights."""
    if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)


def check_dropout(config: Any) -> None:
    """ValueError where a dropout of `config` is outside [0, 1)."""
    for name, value in vars(config).items():
        if name.endswith("dropout") and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; expected 0 <= {name} < 1.")


def plain(value: Any) -> Any:
    """A value without tuples, as it comes back from JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
