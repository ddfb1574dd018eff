"""Decoding orders as data: which cell of the code grid is decoded at which step, and from what.

A `DecodePlan` is made by a pure function of (H, W) and used unchanged by training, decoding, scoring and plots.
It orders *slots*: the positions of the sequence after the prefix. A slot holds the code of a raster cell, or a
forced row-end token (Emu3.5). No other module does neighbour arithmetic.

A video of T frames is the grid (T * H, W) of its frames one below the other; its raster order is that of this grid.

Shapes: H, W grid; N = H * W cells, raster index i = p * W + q; S slots (N, or N + H - 1 with row ends); P prefix.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from itertools import accumulate
from typing import Literal, ParamSpec

import torch
from torch import Tensor

PREFIX = -1
"""Source of a cell that is predicted by the last prefix token."""
NONE = -2
"""Source of a cell that this head does not predict."""
ROW_END = -1
"""Entry of `DecodePlan.cell` for a slot that holds no cell: a forced row-end token, or a learnable one (regions)."""


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made inside may be cached: the caller's inference mode and default device do not reach them.

    Otherwise a plan first used by a validation in inference mode could not be used by the training that follows.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        yield


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """A decoding order. Build one with a function of this module; equal arguments give the same object."""

    name: str
    """"raster", "lossless", "diagonal", "limited", "regions", "blocks", or "scales"."""
    height: int
    width: int
    order: Tensor
    """(N,) int64: raster index of the k-th decoded cell; rows ascend inside a step."""
    step: Tensor
    """(N,) int64, by raster cell: the step that decodes it."""
    n_steps: int
    """Number of decoding steps; one draw of codes each (Sec. 3.2: H + W - 1 for the diagonal plan)."""
    cell: Tensor
    """(S,) int64, in plan order: raster cell of a slot, or ROW_END."""
    h_source: Tensor
    """(N,) int64, by raster cell: the slot whose horizontal logits predict it, or PREFIX, or NONE."""
    v_source: Tensor
    """(N,) int64, by raster cell: the slot whose vertical logits predict it, or PREFIX, or NONE. In the first row of a
    later frame `t_source`, where there is one."""
    slot_step: Tensor
    """(S,) int64, non-decreasing: slots of one step enter the model together."""
    visible: Literal["step"] | Tensor = "step"
    """"step": a slot sees the slots with slot_step <= its own. Otherwise (S, S) bool, row sees column."""
    frames: int = 1
    """T, of a video."""
    t_source: Tensor | None = None
    """(N,) int64, by raster cell of a video: the slot of the frame before whose temporal state predicts it, or NONE."""
    _on: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        of = f" of {self.frames} frames" if self.frames > 1 else ""
        return f"DecodePlan({self.name}, {self.height}x{self.width}{of}, {self.n_steps} steps, {self.n_slots} slots)"

    @property
    def n_cells(self) -> int:
        """N = H * W."""
        return self.height * self.width

    @property
    def n_slots(self) -> int:
        """S."""
        return self.cell.numel()

    @cached_property
    @plain_tensors()
    def row(self) -> Tensor:
        """(S,) int64: grid row of a slot; a row end belongs to the row that it ends."""
        ended = (self.cell == ROW_END).long().cumsum(0) - 1  # only raster plans have row ends
        return torch.where(self.cell >= 0, self.cell // self.width, ended)

    @cached_property
    @plain_tensors()
    def column(self) -> Tensor:
        """(S,) int64: grid column of a slot; W for a row end."""
        return torch.where(self.cell >= 0, self.cell % self.width, self.width)

    @cached_property
    @plain_tensors()
    def slot(self) -> Tensor:
        """(N,) int64, by raster cell: its slot. The inverse of `cell`."""
        slot = torch.empty(self.n_cells, dtype=torch.int64)
        held = self.cell >= 0
        slot[self.cell[held]] = torch.arange(self.n_slots)[held]
        return slot

    @cached_property
    @plain_tensors()
    def cells_of_step(self) -> tuple[Tensor, ...]:
        """For each step, the raster cells it decodes, rows ascending."""
        return torch.split(self.order, torch.bincount(self.step, minlength=self.n_steps).tolist())

    @cached_property
    def cells_before(self) -> tuple[int, ...]:
        """For each step, how many cells are decoded before it."""
        return tuple(accumulate((len(cells) for cells in self.cells_of_step[:-1]), initial=0))

    @cached_property
    @plain_tensors()
    def slots_of_step(self) -> tuple[slice, ...]:
        """For each step, the contiguous slots that are fed once its cells are known."""
        ends = torch.bincount(self.slot_step, minlength=self.n_steps).cumsum(0).tolist()
        return tuple(slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends))

    @property
    def n_inputs(self) -> int:
        """Slots that some prediction depends on: those of the last step are never fed."""
        return self.slots_of_step[-1].start

    @cached_property
    @plain_tensors()
    def has_vertical(self) -> bool:
        """Whether any cell has a vertical source."""
        return bool((self.v_source != NONE).any())

    @cached_property
    @plain_tensors()
    def slot_mask(self) -> Tensor:
        """(S, S) bool: row slot may attend to column slot."""
        if isinstance(self.visible, Tensor):
            return self.visible
        return self.slot_step[:, None] >= self.slot_step[None, :]

    def mask(self, prefix: int, order: Literal["plan", "raster"] = "plan") -> Tensor:
        """(P + S, P + S) bool attention mask, True = may attend.

        The prefix is causal and never sees the image; every slot sees the whole prefix and what `visible` allows
        (Sec. 3.2 and 4.4). `order="raster"` sorts the slots by raster position instead of plan order.
        """
        if prefix < 0:
            raise ValueError(f"prefix length is {prefix}; expected 0 or more.")
        if order not in ("plan", "raster"):
            raise ValueError(f'order is {order!r}; expected "plan" or "raster".')
        image = self.slot_mask
        if order == "raster":
            by_position = torch.argsort(self.row * (self.width + 1) + self.column)
            image = image[by_position][:, by_position]
        mask = torch.zeros(prefix + self.n_slots, prefix + self.n_slots, dtype=torch.bool)
        mask[:prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
        mask[prefix:, :prefix] = True
        mask[prefix:, prefix:] = image
        return mask

    def on(self, name: str, device: torch.device | str) -> Tensor:
        """Tensor attribute `name` on `device`, copied there once."""
        key = (name, str(device))
        if key not in self._on:
            with plain_tensors():
                self._on[key] = getattr(self, name).to(device)
        return self._on[key]


P = ParamSpec("P")


def check_grid(grid: Iterable[int]) -> tuple[int, int]:
    """(H, W) as a tuple of two positive ints."""
    values = tuple(grid)
    if len(values) != 2 or any(int(side) != side or side < 1 for side in values):
        raise ValueError(f"grid is {values}; expected (H, W), two integers of at least 1.")
    return int(values[0]), int(values[1])


def plan_builder(build: Callable[P, DecodePlan]) -> Callable[P, DecodePlan]:
    """A builder of plans that gives the same one for equal arguments, however they are written."""
    signature, kept = inspect.signature(build), lru_cache(maxsize=64)(plain_tensors()(build))

    @wraps(build)
    def plan(*args: P.args, **kwargs: P.kwargs) -> DecodePlan:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return kept(*given.args)

    return plan


def diagonal_plan(*sides: int, height: int = 0, width: int = 0, delay: int = 1) -> DecodePlan:
    """One anti-diagonal D_t = {(p, q): p + q = t} per step (Eq. 2, 3): H + W - 1 steps.

    The horizontal source of (p, q) is its left neighbour's slot, the vertical source the slot above; (0, 0) has the
    prefix for both.

    Args:
        sides: (H, W), which may also be named; or (T, H, W), a video: cell (p, q) of frame t is drawn at step
            delay * t + p + q. With delay = 1 these are T + H + W - 2 steps.
        delay: steps between the same cells of two frames. A cell sees what was in the frame before at (p + y, q + x)
            where y + x < delay; so the delay should be above the largest y + x by which contents move to the left and
            upwards. Its temporal source is (p, q + delay - 1) there, the cell of the step before, or NONE beside the
            frame.
    """
    given = sides or (height, width)
    frames, _ = check_grid((given[0], given[1])) if len(given) == 3 else (1, 1)
    height, width = check_grid(given[-2:] if len(given) == 3 else given)
    if not 1 <= delay <= (width if frames > 1 else 1):
        raise ValueError(f"delay is {delay}; expected 1 to the width {width}, and 1 without frames.")
    return _wavefront(frames, height, width, delay)


@plan_builder
def _wavefront(frames: int, height: int, width: int, delay: int) -> DecodePlan:
    """See `diagonal_plan`. In a step the cells without a vertical source stand first, those without a horizontal one
    last: in an image they do so by their rows."""
    n, area = frames * height * width, height * width
    cells = torch.arange(n)
    t, p, q = cells // area, cells % area // width, cells % width
    step = delay * t + p + q
    from_before = (t > 0) & (q + delay <= width)
    heads = ((p > 0) | from_before).long() + (q == 0)
    order = torch.argsort((3 * step + heads) * n + cells)
    slot = torch.empty(n, dtype=torch.int64)
    slot[order] = cells
    left = torch.where(q > 0, slot.roll(1), NONE)
    before = torch.where(from_before, slot.roll(area - delay + 1), NONE)
    up = torch.where(p > 0, slot.roll(width), before)
    left[0] = up[0] = PREFIX
    return DecodePlan(
        name="diagonal",
        height=frames * height,
        width=width,
        order=order,
        step=step,
        n_steps=int(step[-1]) + 1,
        cell=order,
        h_source=left,
        v_source=up,
        slot_step=step[order],
        frames=frames,
        t_source=before if frames > 1 else None,
    )


@plan_builder
def raster_plan(height: int, width: int, row_end: bool = False) -> DecodePlan:
    """One cell per step in raster order (Eq. 1): H * W steps, horizontal head only.

    With `row_end`, a forced row-end token follows every row but the last. It enters the model together with the last
    code of its row, and its horizontal logits predict the first cell of the next row.
    """
    height, width = check_grid((height, width))
    n = height * width
    cells = torch.arange(n)
    if row_end:
        rows = [torch.cat([cells[p * width : (p + 1) * width], torch.tensor([ROW_END])]) for p in range(height)]
        cell = torch.cat(rows)[:-1]
    else:
        cell = cells
    held = cell >= 0
    slots = torch.arange(cell.numel())
    return DecodePlan(
        name="raster",
        height=height,
        width=width,
        order=cells,
        step=cells,
        n_steps=n,
        cell=cell,
        h_source=slots[held] - 1,
        v_source=torch.full((n,), NONE),
        slot_step=held.long().cumsum(0) - 1,
        visible=torch.ones(cell.numel(), cell.numel(), dtype=torch.bool).tril() if row_end else "step",
    )


@plan_builder
def lossless_plan(height: int, width: int, row_end: bool = False) -> DecodePlan:
    """The raster plan under another name: the same codes, drawn several at a time (`flashar_pl.decoding.lossless`)."""
    return replace(raster_plan(height, width, row_end), name="lossless", _on={})


@plan_builder
def limited_plan(height: int, width: int) -> DecodePlan:
    """The diagonal plan as near to the raster one as it can be, best for a model that was never trained on diagonals.

    A slot sees what both orders show it: slots of its own and earlier diagonals that are not behind it in raster order.
    The horizontal head predicts every cell that has a left neighbour, the vertical head the first column alone.
    """
    plan = diagonal_plan(height, width)
    return replace(
        plan,
        name="limited",
        v_source=torch.where(plan.h_source == NONE, plan.v_source, NONE),
        visible=plan.slot_mask & (plan.cell[:, None] >= plan.cell),
        _on={},
    )


PLANS = ("diagonal", "raster", "lossless", "limited")
"""Names that `make_plan` knows."""


def make_plan(name: str, height: int, width: int, row_end: bool = False, frames: int = 1, delay: int = 1) -> DecodePlan:
    """The plan called `name`; `row_end` concerns plans in raster order only, frames and delay the diagonal one."""
    if name == "diagonal":
        if height % frames:
            raise ValueError(
                f"the grid is {height}x{width}, and the model draws videos of {frames} frames, one below the other; "
                f"expected a multiple of {frames} rows."
            )
        return diagonal_plan(frames, height // frames, width, delay=delay)
    if name == "raster":
        return raster_plan(height, width, row_end)
    if name == "limited":
        return limited_plan(height, width)
    if name == "lossless":
        return lossless_plan(height, width, row_end)
    raise ValueError(f"plan is {name!r}; expected one of {', '.join(PLANS)}.")


def grid_of_ratio(ratio: float, cells: int) -> tuple[int, int]:
    """The grid (H, W) with at most `cells` codes that is best for images of width / height = `ratio`."""
    steep = max(ratio, 1 / ratio)
    pairs = [(short, min(round(short * steep), cells // short)) for short in range(1, math.isqrt(cells) + 1)]
    # Near to the ratio and, half as important, to the full number of codes, on a logarithmic scale.
    short, long = min(pairs, key=lambda p: 2 * abs(math.log(p[1] / p[0] / steep)) + math.log(cells / p[0] / p[1]))
    return (long, short) if ratio < 1 else (short, long)
