"""Pieces of a validation: sums of losses over ranks, and what samples to draw.

Shapes: B samples of a batch, H, W grid, n samples to generate, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import entr

from flashar_pl.backbones.condition import Batch, ClassIds, Condition
from flashar_pl.checkpoints.description import build_on_meta
from flashar_pl.decoding.samples import SampleSet
from flashar_pl.grid import DecodePlan
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import adaptation, merge
from flashar_pl.ranks import gather
from flashar_pl.training.config import ValidationConfig

LOSSES = ("loss", "fused", "horizontal", "vertical")


class LossSums:
    """Sums over the valid samples of a split, float64. Every rank adds its own; `reduce` joins them.

    Ranks and batches may hold different numbers of samples, of other grids than that of `plan`; the map of the gate is
    of this grid alone.
    """

    def __init__(self, plan: DecodePlan, device: torch.device) -> None:
        self.plan = plan
        self.scalars = torch.zeros(len(LOSSES) + 4, dtype=torch.float64, device=device)
        self.gate = torch.zeros(plan.n_cells + 1, dtype=torch.float64, device=device)  # (N + 1,), the last: samples

    def add(self, losses: dict[str, Tensor], valid: Tensor | None, plan: DecodePlan | None = None) -> None:
        """Add what `GridModel.loss` returned for a batch; valid (B,) bool or None = all; plan None = the first."""
        plan = plan or self.plan
        nll, gate = losses["nll"].double(), losses["gate"].flatten(1).double()  # (B,), (B, N)
        weight = torch.ones_like(nll) if valid is None else valid.to(nll)
        count = weight.sum()
        interior = _interior(plan).to(gate.device)  # (N,)
        cells = interior.sum().clamp_min(1)
        entropy = entr(gate) + entr(1 - gate)  # nats
        inside = [(values * interior).sum(1) / cells for values in (gate, entropy)]  # (B,) each
        means = [losses[name].double() * count for name in LOSSES]
        self.scalars += torch.stack([*means, *((values * weight).sum() for values in (nll, *inside)), count])
        if (plan.height, plan.width) == (self.plan.height, self.plan.width):
            self.gate += torch.cat([(gate * weight[:, None]).sum(0), count[None]])

    def reduce(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all samples of all ranks; `total` sums a tensor over ranks. Also joins `gate`.

        Keys: loss, fused, horizontal, and vertical if the plan has such sources (nats per target), nll (nats per
        image) and, where the plan has targets that both heads predict, gate_mean and gate_entropy (nats) over those
        targets.
        """
        scalars, self.gate = total(self.scalars), total(self.gate)
        *means, count = scalars.tolist()
        if count == 0:
            raise ValueError("the split has no samples; expected at least one.")
        names = (*LOSSES, "nll", "gate_mean", "gate_entropy")
        result = {name: value / count for name, value in zip(names, means, strict=True)}
        if not bool(_interior(self.plan).any()):
            del result["gate_mean"], result["gate_entropy"]
        if not self.plan.has_vertical:
            del result["vertical"]
        return result

    @property
    def gate_map(self) -> Tensor:
        """Mean gate (H, W) after `reduce`."""
        return (self.gate[:-1] / self.gate[-1]).view(self.plan.height, self.plan.width)


def _interior(plan: DecodePlan) -> Tensor:
    """Cells that both heads predict: (N,) bool."""
    return (plan.h_source >= 0) & (plan.v_source >= 0)


@dataclass(frozen=True)
class Chosen:
    """What samples are drawn for: sample i is drawn for entry i modulo their number."""

    condition: Condition
    """One row for each entry."""
    numbers: list[int]
    """Class of each entry, or the id of the validation sample it comes from."""
    real: dict[int, Tensor]
    """Number -> codes (H, W) of a real image, for the first entries, where one was seen."""


class SampleConditions:
    """The conditions of generated samples, and real images of the first `shown` of them.

    A class-conditional model goes through its classes; any other through the conditions of the first `limit` samples
    that validation saw, collected over all ranks.
    """

    def __init__(self, model: GridModel, limit: int, shown: int = 0) -> None:
        takes = model.backbone.conditioning
        self.classes = takes.size if takes.kind == "class" else None
        self.limit, self.shown = limit, shown
        self._conditions: dict[int, Condition] = {}
        self._real: dict[int, tuple[int, Tensor]] = {}
        """Number -> id of the sample and its codes (H, W), the sample that comes first in the split."""

    def collect(self, batch: Batch) -> None:
        """Remember conditions and codes of a validation batch, by sample id."""
        if self.classes is None and batch.index is None:
            raise ValueError("samples of a text-conditional model need Batch.index, the ids of the validation samples.")
        if len(self._real) >= min(self.shown, self.classes or self.shown) and (
            self.classes is not None or len(self._conditions) >= self.limit
        ):
            return
        rows = range(len(batch)) if batch.valid is None else batch.valid.nonzero()[:, 0].tolist()
        ids = [len(self._real)] * len(batch) if batch.index is None else batch.index.tolist()
        numbers, cpu = ids, batch.condition.to("cpu")
        if isinstance(cpu, ClassIds):
            numbers = cpu.ids.tolist()
        for row in rows:
            if self.classes is None and len(self._conditions) < self.limit:
                self._conditions[ids[row]] = cpu.rows([row])
            wanted = len(self._real) < self.shown if self.classes is None else numbers[row] < self.shown
            if wanted and numbers[row] not in self._real:
                self._real[numbers[row]] = (ids[row], batch.codes[row].cpu())

    def join(self) -> Chosen:
        """All classes, or what was collected on all ranks."""
        seen: dict[int, Condition] = {}
        real: dict[int, tuple[int, Tensor]] = {}
        for conditions, images in gather((self._conditions, self._real)):
            seen |= conditions
            real |= {number: each for number, each in images.items() if number not in real or each[0] < real[number][0]}
        codes = {number: image for number, (_, image) in real.items()}
        if self.classes is not None:
            return Chosen(ClassIds(torch.arange(self.classes)), list(range(self.classes)), codes)
        numbers = sorted(seen)[: self.limit]
        return Chosen(Condition.cat([seen[number] for number in numbers]), numbers, codes)


@torch.no_grad()
def for_sampling(model: GridModel, precision: str) -> GridModel:
    """What to draw samples from in a run with this Trainer precision: where it is bf16-mixed, a bfloat16 copy.

    LoRA's updates are merged, and the gate stays in float32, as in `flashar generate --dtype bf16`; autocast would
    cast every weight at every step. A sharded model is gathered in its compute dtype anyway, and returned as it is.
    """
    if precision != "bf16-mixed" or model.sharded:
        return model
    state, copy, lora = dict(model.state_dict()), build_on_meta(model.config()), adaptation(model)
    roles = copy.roles()
    plain = state.items() if lora is None else merge(state, lora)
    low = {name: t.detach().to(torch.float32 if roles.get(name) == "gate" else torch.bfloat16) for name, t in plain}
    copy.load_state_dict(low, assign=True)
    return copy.requires_grad_(False).eval()


def sample_set(settings: ValidationConfig, n: int, plan: DecodePlan, condition: Condition) -> SampleSet:
    """The n samples of a validation."""
    grid, batch = (plan.height, plan.width), min(settings.sample_batch, n)
    return SampleSet(condition, grid, plan.name, settings.sampling, batch, settings.seed, n=n)
