"""What callbacks ask of the module that trains."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn

from flashar_pl.grid import DecodePlan
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import LoraConfig
from flashar_pl.training.config import OptimiserConfig, ScheduleConfig, ValidationConfig
from flashar_pl.training.stages import Schedule


class Trained(Protocol):
    """A LightningModule with one model, its average, and a schedule in stages. `FlashARModule` is one."""

    net: GridModel
    ema: GridModel | None
    lora: LoraConfig | None
    optimiser: OptimiserConfig
    schedule: ScheduleConfig
    validation: ValidationConfig
    total_steps: int | None
    gradient_norm: Tensor

    @property
    def built_schedule(self) -> Schedule: ...

    @property
    def evaluated(self) -> GridModel: ...

    @property
    def manifest(self) -> Any: ...

    def evaluation_plan(self, codes: Tensor) -> DecodePlan: ...


def trained(module: nn.Module) -> Trained:
    """`module` as what it is: Lightning hands its hooks a module of no particular kind."""
    return cast("Trained", module)
