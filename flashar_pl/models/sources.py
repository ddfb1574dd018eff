"""Which hidden states predict which cells, by which head (Sec. 4.2): of a whole grid, and step by step.

Shapes: N cells, S' slots that were fed, n cells of a step. Hidden states are (R, 1 + S', D): the last prefix token,
then the slots in plan order. Those of a video are brought into the order of their targets first, (R, N, D), where the
state that predicts the k-th decoded cell is row k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from flashar_pl.grid import NONE, PREFIX, DecodePlan, plain_tensors

Corner = Literal["horizontal", "fused", "released"]
"""What predicts (0, 0)."""


@dataclass(frozen=True)
class Sources:
    """For every raster cell, which heads predict it (Sec. 4.2), and from which row of the hidden states."""

    h: Tensor
    """(N,) int64: row of the horizontal states; 0 = last prefix token."""
    v: Tensor
    """(N,) int64: row of the vertical states."""
    both: Tensor
    """Raster cells that both heads predict."""
    only_h: Tensor
    """Raster cells that only the horizontal head predicts."""
    only_v: Tensor
    """Raster cells that only the vertical head predicts."""
    corner: bool
    """Whether both heads predict (0, 0), then the first cell of `both`."""


@lru_cache(maxsize=64)
@plain_tensors()
def sources(plan: DecodePlan, corner: Corner, device: torch.device) -> Sources:
    """The sources of `plan`; corner "horizontal" leaves (0, 0) to the horizontal head, any other gives it both."""
    has_h = plan.h_source != NONE
    has_v = plan.v_source != NONE
    if corner == "horizontal":
        has_v &= plan.v_source != PREFIX
    cells = torch.arange(plan.n_cells)
    both = has_h & has_v
    rows = [plan.slot] * 2 if plan.t_source is not None else [plan.h_source + 1, plan.v_source + 1]
    return Sources(
        h=rows[0].clamp_min(0).to(device),
        v=rows[1].clamp_min(0).to(device),
        both=cells[both].to(device),
        only_h=cells[has_h & ~has_v].to(device),
        only_v=cells[~has_h & has_v].to(device),
        corner=bool(both[0]),
    )


@dataclass(frozen=True)
class StepSources:
    """Sources of one step's cells among the states that were fed last: contiguous, so slices suffice.

    Of the step's n cells the first `only_h` have no vertical source and the last `only_v` no horizontal one.
    """

    h: slice
    """Horizontal states of cells [0, n - only_v)."""
    v: slice
    """Vertical states of cells [only_h, n)."""
    only_h: int
    only_v: int
    corner: bool
    """Whether this step decodes (0, 0) from both heads."""


@lru_cache(maxsize=64)
@plain_tensors()
def step_sources(plan: DecodePlan, corner: Corner) -> tuple[StepSources, ...]:
    """`StepSources` of every step. The states fed last are those of the previous step, or the last prefix token."""
    cpu = sources(plan, corner, torch.device("cpu"))
    h, v, alone = cpu.h.tolist(), cpu.v.tolist(), [set(each.tolist()) for each in (cpu.only_h, cpu.only_v)]
    steps = []
    for t, step in enumerate(plan.cells_of_step):
        cells, n = step.tolist(), len(step)
        first = _fed_last(plan, t) if plan.t_source is None else plan.cells_before[t]
        only_h, only_v = (sum(cell in each for cell in cells) for each in alone)
        steps.append(
            StepSources(
                h=_as_slice([h[cell] - first for cell in cells[: n - only_v]]),
                v=_as_slice([v[cell] - first for cell in cells[only_h:]]),
                only_h=only_h,
                only_v=only_v,
                corner=cpu.corner and t == 0,
            )
        )
    return tuple(steps)


def _fed_last(plan: DecodePlan, t: int) -> int:
    """The first row of the states that were fed before step t."""
    return 0 if t == 0 else plan.slots_of_step[t - 1].start + 1


@lru_cache(maxsize=64)
@plain_tensors()
def by_target(plan: DecodePlan, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(3, N) int64 of a video: for the k-th decoded cell the rows of the states of its left neighbour, of that above
    and of that in the frame before, -1 where there is none; and of every step the same among the states fed last."""
    assert plan.t_source is not None
    up = torch.where(plan.v_source == plan.t_source, NONE, plan.v_source)
    rows = (torch.stack([plan.h_source, up, plan.t_source]) + 1)[:, plan.order]
    steps = [part - _fed_last(plan, t) for t, part in enumerate(rows.split([len(c) for c in plan.cells_of_step], 1))]
    return rows.clamp_min(-1).to(device), tuple(part.clamp_min(-1).to(device) for part in steps)


def _as_slice(index: list[int]) -> slice:
    if not index:
        return slice(0, 0)
    found = slice(index[0], index[0] + len(index))
    assert index[0] >= 0 and index == list(range(found.start, found.stop)), "sources are not contiguous"
    return found


def fed_by_slots(plan: DecodePlan, source: str, device: torch.device) -> tuple[Tensor, int]:
    """(N,) bool: targets whose "h_source" or "v_source" is a slot, over which Eq. 10 averages; how many, at least 1.

    They are counted on the CPU: no synchronisation.
    """
    return plan.on(source, device) >= 0, max(1, int((getattr(plan, source) >= 0).sum()))
