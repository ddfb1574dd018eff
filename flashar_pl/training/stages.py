"""Which parameters train at a step, and how fast: pure functions of the step (Sec. 4.3, 5.1)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

from flashar_pl.models.base import STAGE1_ROLES

STAGE1_SHARE, BACKBONE_FACTOR = 0.2, 0.2
"""The paper's two-stage schedule (Sec. 5.1)."""
LORA_FACTOR = 5.0
"""LoRA's learning rate relative to the base: low-rank updates start at 0 and need larger steps (docs/training.md)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Two stages and one cosine over the whole run (Sec. 4.3)."""

    stage1_share: float | None = None
    """Share of the steps in which only what is new trains: vertical branch, vertical head and gate; in BlockDiffusion
    mask, time and head. None = 0.2, raster models and PAR 0."""
    backbone_factor: float | None = None
    """The backbone's learning rate in stage 2, relative to the base; None = 0.2, with LoRA 5, raster models and PAR 1.
    """
    warmup: int = 0
    """Steps of linear warm-up."""
    per_stage: bool = False
    """Each stage has a cosine of its own, as in the authors' Emu3.5 code."""
    floor: float = 0.0
    """Where a cosine ends, relative to the base rate of the stage, for every role that trains in it."""
    flat_stage1: int = 0
    """Per stage: steps of stage 1 at full rate before its cosine begins."""
    flat_stage2: int = 0
    """Per stage: the same of stage 2."""
    stage2_rate: float = 1.0
    """Per stage: base rate of stage 2 relative to that of stage 1."""
    milestones: list[float] = field(default_factory=list)
    """Shares of the steps at which every rate is multiplied by `gamma`, in place of a cosine, as in the authors'
    LlamaGen code."""
    gamma: float = 0.2
    """At milestones."""

    def __post_init__(self) -> None:
        if not 0 <= (self.stage1_share or 0) <= 1:
            raise ValueError(f"schedule.stage1_share is {self.stage1_share}; expected 0 to 1.")
        if (self.backbone_factor or 0) < 0:
            raise ValueError(f"schedule.backbone_factor is {self.backbone_factor}; expected 0 or more.")
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup is {self.warmup}; expected 0 or more steps.")
        if not 0 <= self.floor < 1 or min(self.flat_stage1, self.flat_stage2) < 0 or self.stage2_rate <= 0:
            raise ValueError(
                f"schedule.floor is {self.floor}, flat_stage1 {self.flat_stage1}, flat_stage2 {self.flat_stage2}, "
                f"stage2_rate {self.stage2_rate}; expected 0 <= floor < 1, flat parts of 0 or more, stage2_rate > 0."
            )
        if not self.per_stage and (self.flat_stage1 or self.flat_stage2 or self.stage2_rate != 1):
            raise ValueError("schedule.flat_stage1, flat_stage2 and stage2_rate need schedule.per_stage: true.")
        if not all(0 < share < 1 for share in self.milestones) or not 0 < self.gamma <= 1:
            raise ValueError(
                f"schedule.milestones is {self.milestones}, gamma {self.gamma}; expected shares of the run between 0 "
                "and 1, and 0 < gamma <= 1."
            )
        if not self.milestones and self.gamma != 0.2:
            raise ValueError(f"schedule.gamma is {self.gamma}, and there are no milestones; give schedule.milestones.")
        if self.milestones and (self.per_stage or self.floor):
            raise ValueError("schedule.milestones take the place of a cosine; leave per_stage and floor out.")

    def resolve(self, raster: bool, lora: bool = False) -> ScheduleConfig:
        """The same settings without None. ValueError for a stage 1 in which nothing could train."""
        share = (0.0 if raster else STAGE1_SHARE) if self.stage1_share is None else self.stage1_share
        usual = 1.0 if raster else LORA_FACTOR if lora else BACKBONE_FACTOR
        factor = usual if self.backbone_factor is None else self.backbone_factor
        if raster and share > 0:
            raise ValueError(
                f"schedule.stage1_share is {share}, but a raster model has no vertical branch to train in stage 1; "
                "set it to 0, or give model.flashar."
            )
        return replace(self, stage1_share=share, backbone_factor=factor)

    def build(self, total_steps: int) -> Schedule:
        """The schedule over `total_steps`; resolved settings only."""
        return Schedule(total_steps, **asdict(self))


@dataclass(frozen=True)
class Schedule(ScheduleConfig):
    """Two stages under one cosine. A step is the number of completed optimiser steps."""

    total_steps: int
    """Steps of the whole run, fixed when it starts."""
    stage1_share: float = field(default=STAGE1_SHARE, kw_only=True)
    """0 = there is no stage 1 (raster pre-training)."""
    backbone_factor: float = field(default=BACKBONE_FACTOR, kw_only=True)
    """Learning rate of the backbone in stage 2 relative to the base."""

    @property
    def stage1_steps(self) -> int:
        """ceil(share * total); a product that is a whole number but for round-off (0.28 * 25 is 7 + 9e-16) is that."""
        return math.ceil(self.stage1_share * self.total_steps - 1e-9)

    @property
    def freezes(self) -> bool:
        """Whether some role is frozen at some step."""
        return self.stage1_steps > 0 or self.backbone_factor == 0

    def stage(self, step: int) -> int:
        """1 or 2."""
        return 1 if step < self.stage1_steps else 2

    def factor(self, role: str, stage: int) -> float:
        """Learning rate of a role relative to the base; 0 = frozen. The horizontal head is frozen in stage 1 too."""
        if stage == 1:
            return 1.0 if role in STAGE1_ROLES else 0.0
        return self.backbone_factor if role == "backbone" else 1.0

    def trains(self, role: str, step: int) -> bool:
        """Whether a role has gradients at a step."""
        return self.factor(role, self.stage(step)) > 0

    def ever_trains(self, role: str) -> bool:
        """Whether a role has gradients at any step."""
        return any(self.factor(role, self.stage(step)) > 0 for step in (0, self.total_steps))

    def scale(self, role: str, step: int) -> float:
        """Learning rate relative to the base: low + (top - low) (1 + cos(pi done)) / 2, after the warm-up.

        done: of the run; or per stage, of the stage after its flat part. top is the role's factor and low the floor,
        both times `stage2_rate` in a stage 2 of its own. With milestones top * gamma^(those behind).
        """
        stage, begin, end, flat, rate = self.stage(step), 0, self.total_steps, 0, 1.0
        if self.per_stage and stage == 1:
            end, flat = self.stage1_steps, self.flat_stage1
        elif self.per_stage:
            begin, flat, rate = self.stage1_steps, self.flat_stage2, self.stage2_rate
        done = min(max(step - begin - flat, 0) / max(end - begin - flat, 1), 1.0)
        rising = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        factor = self.factor(role, stage)
        if self.milestones:
            behind = sum(step >= round(share * self.total_steps) for share in self.milestones)
            return factor * rising * self.gamma**behind
        low = self.floor * rate if factor else 0.0
        return low + (factor * rate - low) * rising * (1 + math.cos(math.pi * done)) / 2
