"""`GridModel`: a backbone with its output heads, trained, scored and decoded under any `DecodePlan`.

Shapes: B samples, R rows, P prefix, S slots, S' slots that were fed, H, W grid, N cells, D width, V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, check_codes, slot_codes
from flashar_pl.backbones.condition import Condition, Given, Prefix
from flashar_pl.grid import DecodePlan, make_plan
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.layers.tensor_parallel import GatheredLinear
from flashar_pl.layers.transformer import Mask
from flashar_pl.models.dual_head import DualHead, Split, States, Teacher
from flashar_pl.models.losses import AUX_WEIGHT
from flashar_pl.models.sources import by_target, fed_by_slots, step_sources
from flashar_pl.numerics import is_cut, wide
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import Tokenizer

ROLES = ("backbone", "horizontal_head", "vertical", "vertical_head", "gate", "added")
"""What a parameter is for; every parameter has exactly one role (Sec. 4.3 trains them differently)."""
STAGE1_ROLES = ("vertical", "vertical_head", "gate", "added")
"""What trains in stage 1."""
ROLE_OF = {
    "backbone.head.": "horizontal_head",
    "dual_head.horizontal.": "horizontal_head",
    "dual_head.vertical.": "vertical_head",
    "dual_head.gate.": "gate",
    "dual_head.corner_gate.": "gate",
    "dual_head.time_gate.": "gate",
    "dual_head.intra.": "added",
    "vertical.": "vertical",
    "temporal.": "vertical",
}
"""Role by the begin of a parameter's name; "backbone" for all others."""


@dataclass
class Logits:
    """Materialised logits of a whole grid, float32."""

    fused: Tensor
    """(B, H, W, V): [p, q] predicts the code at (p, q)."""
    horizontal: Tensor
    """(B, H, W, V): what the horizontal head emits at (p, q), for the cell to the right (raster: the next one)."""
    vertical: Tensor
    """(B, H, W, V): what the vertical head emits at (p, q), for the cell below."""
    gate: Tensor
    """(B, H, W): weight of the horizontal logits for the target (p, q)."""


class GridModel(nn.Module, ABC):
    """Backbone, branches and heads behind one interface."""

    backbone: Backbone
    dual_head: DualHead
    method: str
    """What messages call it."""
    plan_name: str
    """Name of the plan the model was made for."""
    plans: ClassVar[tuple[str, ...]]
    """Names of all plans it can run."""
    own_decoding: ClassVar[bool] = False
    """Whether it decodes by `draw`, because no steps of a plan describe how."""
    reads_tokenizer: ClassVar[bool] = False
    """Whether it draws with the help of its tokenizer; see `use_tokenizer`."""
    vertical_layers: int = 0
    """Layers of the vertical branch, k."""
    frames: int | None = None
    """Frames of a video, 1 = draws images; None = it does not know of frames, as in raster order."""
    delay: int = 1
    """Of `diagonal_plan`."""
    null_style: Literal["official", "released"] = "official"
    """Which prompt without a text it was trained with, where its backbone does not say it."""

    @abstractmethod
    def states(self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, n_prefix: int, vertical: bool) -> States:
        """Final hidden states (R, L, D) of a sequence x (R, L, D); without `vertical`, that branch is left out.

        n_prefix: how many of the visible positions, cached ones included, belong to the prefix; they come first.
        """

    def rope(self, plan: DecodePlan, prefix: Prefix, guided: bool = False) -> Rope:
        """The rotation of every position. guided: the rows are B conditional ones, then their B unconditional ones."""
        return self.backbone.rope(plan, prefix)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (R, n) int64 in slot order, -1 where a slot holds no cell -> (R, n, D)."""
        return self.backbone.embed(codes)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Draw codes for `tokenizer` from now on. ValueError where it has not the model's codes; it names both."""
        if tokenizer.vocabulary != self.backbone.vocabulary:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocabulary} codes, the model {self.backbone.vocabulary}; give the "
                "tokenizer that made the training codes: --tokenizer, or --pixels of a benchmark."
            )

    def invent(self) -> None:
        """Make whatever drawing needs besides weights at random, as they are in a measurement; nothing, mostly."""

    def draw(
        self,
        condition: Condition,
        plan: DecodePlan,
        settings: SamplingSettings,
        seeds: list[int],
        unconditional: Condition | None,
        on_step: Callable[[int, Tensor], object],
    ) -> Tensor:
        """Codes (B, H, W) of a model with `own_decoding`. on_step: called with the number of finished steps of the plan
        and the codes so far (B, N) in its order."""
        raise NotImplementedError(type(self).__name__)

    def guided_steps(self, plan: DecodePlan, settings: SamplingSettings) -> list[bool]:
        """Which decoding steps are guided."""
        return [settings.guides(done) for done in plan.cells_before]

    @property
    def only_grid(self) -> tuple[int, int] | None:
        """The one grid (H, W) that it can draw; None = it can draw several."""
        return self.backbone.usual_grid if self.backbone.own_model else None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, weights: Literal["auto", "raw", "ema"] = "auto", n_head: int | None = None
    ) -> Self:
        """The model stored at `path`, on the CPU in evaluation mode; arguments as in `checkpoints.weights.load_model`.

        Raises:
            ValueError: no such model, or one of another class: a raster model is no FlashAR model.
        """
        model = resolve_name("flashar_pl.checkpoints.weights:load_model")(path, weights, n_head).model.eval()
        if not isinstance(model, cls):
            found = type(model).__name__
            raise ValueError(
                f"{path} holds a {model.method} model, not a {cls.__name__}; expected {found}.from_pretrained."
            )
        return model

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain types from which `flashar_pl.checkpoints.description.build_model` makes an equal model."""

    def cache_spec(self) -> CacheSpec:
        """What a KV cache must hold for this model."""
        return self.backbone.cache_spec(self.vertical_layers)

    def roles(self) -> dict[str, str]:
        """Parameter name -> role, for every parameter."""
        return {
            name: next((role for start, role in ROLE_OF.items() if name.startswith(start)), "backbone")
            for name, _ in self.named_parameters()
        }

    def make_plan(self, name: str | None, height: int, width: int) -> DecodePlan:
        """The plan called `name` (None = the model's own), with row ends where the backbone has them.

        ValueError if the model cannot run it.
        """
        plan = make_plan(name or self.plan_name, height, width, self.backbone.row_ends, self.frames or 1, self.delay)
        self.check_plan(plan)
        return plan

    def check_plan(self, plan: DecodePlan) -> None:
        """ValueError if the model cannot run `plan`."""
        if self.own_decoding:
            raise ValueError(
                f"a {self.method} model has no step that a plan describes; expected its own logits, loss or generate."
            )
        if plan.has_vertical and self.dual_head.vertical is None:
            raise ValueError(
                f"the {plan.name} plan needs a vertical head, and this is a raster model. For training-free decoding "
                f"wrap it first: FlashAR(backbone, branch_layer=m), on the command line --branch-layer m (0 to "
                f"{self.backbone.n_layer}), or take the raster plan."
            )
        if plan.has_vertical and plan.frames != (self.frames or 1):
            raise ValueError(
                f"the {plan.name} plan has {plan.frames} frames, and the model was made for {self.frames or 1}; "
                "expected a model of as many (model.flashar.video), or the raster plan."
            )

    def _plan_of(self, codes: Tensor, plan: DecodePlan | None) -> DecodePlan:
        """The plan given, or the model's own for codes (B, H, W). ValueError if either is of the wrong kind."""
        check_codes(codes, self.backbone.vocabulary)
        if plan is None:
            return self.make_plan(None, codes.shape[1], codes.shape[2])
        if not isinstance(plan, DecodePlan):
            raise ValueError(f"plan is {plan!r}; expected a DecodePlan, such as raster_plan(H, W) of flashar_pl.grid.")
        return plan

    def teacher_forced(
        self, codes: Tensor, condition: Given, plan: DecodePlan, n_slots: int, vertical: bool = True
    ) -> States:
        """States (B, 1 + n_slots, D) at the last prefix token and the first slots of (B, H, W), teacher-forced."""
        self.check_plan(plan)
        if codes.shape[1:] != (plan.height, plan.width):
            raise ValueError(f"codes are a {tuple(codes.shape[1:])} grid; the plan is {plan!r}.")
        prefix = self.backbone.prefix(self.backbone.check_condition(condition, codes.shape[0]))
        x = torch.cat([prefix.x, self.embed(slot_codes(codes, plan)[:, :n_slots])], dim=1)
        length = x.shape[1]
        rope = self.rope(plan, prefix)[:, :length]
        mask = self.backbone.attention_mask(plan, prefix, n_slots)
        h, v = self.states(self.backbone.input_dropout(x), rope, mask, None, len(prefix), vertical)
        return h[:, len(prefix) - 1 :], None if v is None else v[:, len(prefix) - 1 :]

    def _embedded(self, codes: Tensor, plan: DecodePlan) -> Tensor | None:
        """Codes (B, H, W) as (B, N, D), where the cells of a step tell one another."""
        return self.embed(codes.flatten(1).long()) if self.dual_head.groups(plan) else None

    def forward(self, codes: Tensor, condition: Given, plan: DecodePlan | None = None) -> Logits:
        """All logits of codes (B, H, W) int64, teacher-forced. plan None = the model's own."""
        plan = self._plan_of(codes, plan)
        h, v = self.teacher_forced(codes, condition, plan, plan.n_slots)
        fused, horizontal, vertical, gate = self.dual_head(h, v, plan, self._embedded(codes, plan))
        shape = codes.shape[1:]
        return Logits(*(part.unflatten(1, shape) for part in (fused, horizontal, vertical, gate)))

    @torch.no_grad()
    def _teacher(self, codes: Tensor, condition: Given, weight: float, temperature: float) -> Teacher:
        """This model as it is now, in raster order. It draws the random numbers that the caller will draw next: so a
        condition that dropout takes away is away for both."""
        plan = self.make_plan("raster", codes.shape[1], codes.shape[2])
        with torch.random.fork_rng([codes.device] if codes.is_cuda else []):
            states, _ = self.teacher_forced(codes, condition, plan, plan.n_inputs, vertical=False)
        return Teacher(states, plan, weight, temperature)

    def loss(
        self,
        codes: Tensor,
        condition: Given,
        plan: DecodePlan | None = None,
        valid: Tensor | None = None,
        aux_weight: float | tuple[float, float] = AUX_WEIGHT,
        gate_collapse: float = 0.0,
        distillation: float = 0.0,
        temperature: float = 2.0,
        split: Split | None = None,
    ) -> dict[str, Tensor]:
        """Training losses of codes (B, H, W) int64 (Eq. 9, 10); logits are never materialised.

        valid: (B,) bool; other samples count nothing. aux_weight: of both, or of L_H and of L_V. gate_collapse: weight
        of 1 - mean H2(g), see `DualHead.gate_collapse`. distillation, temperature: weight, T of `distillation`,
        whose teacher is this model in raster order. split: what takes the place of the fused loss in "loss".
        Returns scalars "loss" = fused + aux_weight (L_H + L_V), "fused",
        "horizontal", "vertical" in nats per target, and detached "nll" (B,), nats per image under the plan's
        factorisation, and "gate" (B, H, W). Under a plan without vertical sources "loss" is "fused".
        """
        plan = self._plan_of(codes, plan)
        distils = distillation and plan.has_vertical
        teacher = self._teacher(codes, condition, distillation, temperature) if distils else None
        h, v = self.teacher_forced(codes, condition, plan, plan.n_inputs, vertical=plan.has_vertical)
        weight = wide(h[:0]).new_ones(len(h)) if valid is None else valid.to(wide(h[:0]))
        labels, options = codes.flatten(1).long(), (weight, aux_weight, gate_collapse, teacher, split)
        losses = self.dual_head.losses(h, v, labels, plan, *options, self._embedded(codes, plan))
        samples = weight.sum().clamp_min(1)

        def mean(values: Tensor, targets: Tensor | int, n: int) -> Tensor:
            """Over the valid samples and n targets."""
            return ((values * targets).sum(1) * weight).sum() / (samples * n)

        fused = mean(losses.fused, 1, plan.n_cells)
        horizontal, vertical = fused, torch.zeros_like(fused)
        if plan.has_vertical:
            horizontal = mean(losses.horizontal, *fed_by_slots(plan, "h_source", fused.device))
            vertical = mean(losses.vertical, *fed_by_slots(plan, "v_source", fused.device))
        return {
            "loss": losses.total / (samples * plan.n_cells),
            "fused": fused,
            "horizontal": horizontal,
            "vertical": vertical,
            "nll": losses.fused.sum(1),
            "gate": losses.gate.unflatten(1, codes.shape[1:]),
        }

    def prefix(self, condition: Condition) -> Prefix:
        """The embedded condition. Decoding asks the model, not its backbone (sharded units)."""
        return self.backbone.prefix(condition)

    @property
    def device(self) -> torch.device:
        """Where inputs must be. Sharded parameters may rest elsewhere."""
        parameter: Any = next(self.parameters())
        if is_cut(parameter) and parameter.device_mesh.device_type != parameter.device.type:
            return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
        return parameter.device

    @property
    def sharded(self) -> bool:
        """Whether its parameters are cut over devices."""
        return any(is_cut(parameter) for parameter in self.parameters())

    @property
    def shared(self) -> bool:
        """Whether several devices hold it together and decode in step (`decoding.tensor_parallel`)."""
        return isinstance(self.dual_head.horizontal, GatheredLinear)

    def agreed(self, codes: Tensor) -> Tensor:
        """Codes that were drawn, the same on all devices that share the model: those of the first one."""
        head = self.dual_head.horizontal
        return head.share.from_first(codes) if isinstance(head, GatheredLinear) else codes

    def prefill(self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache, vertical: bool = True) -> States:
        """Feed the prefix x (R, P, D); states (R, 1, D) of its last token."""
        cache.n_prefix = x.shape[1]
        h, v = self.states(x, rope, mask, cache, cache.n_prefix, vertical)
        cache.advance(x.shape[1])
        return h[:, -1:], None if v is None else v[:, -1:]

    def step(self, codes: Tensor, rope: Rope, mask: Mask, cache: KVCache, vertical: bool = True) -> States:
        """Feed one step's slots, codes (R, n) int64; their states (R, n, D)."""
        states = self.states(self.embed(codes), rope, mask, cache, cache.n_prefix, vertical)
        cache.advance(codes.shape[1])
        return states

    def step_logits(self, states: States, plan: DecodePlan, t: int) -> Tensor:
        """Fused logits (R, n, V) float32 of the cells of step t, from the states that were fed last."""
        near = None if plan.t_source is None else by_target(plan, states[0].device)[1][t]
        return self.dual_head.step(*states, step_sources(plan, self.dual_head.corner)[t], near)

    def draw_step(self, states: States, plan: DecodePlan, t: int, take: Callable[[Tensor, slice], Tensor]) -> None:
        """Draw the cells of step t: all together, or in the groups of an `IntraHead`.

        take: makes of logits (R, m, V), as `step_logits`, of the cells of a slice of the step their codes (R, m) int64.
        """
        (h, v), n = states, len(plan.cells_of_step[t])
        if not self.dual_head.groups(plan) or n == 1:
            take(self.step_logits(states, plan, t), slice(0, n))
        else:
            assert v is not None
            at = step_sources(plan, self.dual_head.corner)[t]
            self.dual_head.draw_step(h, v, at, lambda logits, cells: self.embed(take(logits, cells)))
