"""Communication inside a diagonal: its codes are drawn in groups, and a group sees the codes drawn before it.

FlashAR draws the codes of a diagonal independently of one another. Here a small network adds to the states that predict
a cell a term that depends on the states and the drawn codes of the other cells of the diagonal, before the heads run:

    delta_i = W silu(A s_i + b + sum_j k_(j-i) U s_j + sum_(j before i) l_(j-i) (E x_j + e))

s_i are the horizontal and vertical state that predict cell i (zeros where there is none), x_j is the model's embedding
of code c_j, its mean square made 1; k and l hold a learnt weight for every distance and pattern, of which each serves
some channels. So log p(diagonal) is the sum over groups of
log p(group | groups before), and the likelihood of an image stays one. W starts at zero: a new head changes nothing.

With g groups the k-th cell of a diagonal is in the group of k modulo g; a higher power of two splits the groups of a
lower one. While training, the groups of every diagonal are random, so one head serves every g.

Shapes: R rows, N cells, T steps, n cells of a step (all: of the longest one), m of a group, D width, C channels,
K patterns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from flashar_pl.grid import DecodePlan, plain_tensors

REACH = 63
"""Cells further away on the diagonal are not seen."""
PATTERNS = 64
"""K."""
MOST = 16
"""Groups that a diagonal has at most while training."""


def turns(groups: int) -> list[int]:
    """The remainders k modulo `groups` in the order in which they are drawn: 0, 2, 1, 3 of four, far apart first."""
    order = [0]
    while len(order) < groups:
        order = [2 * k for k in order] + [2 * k + 1 for k in order]
    return order


def check_groups(groups: int) -> None:
    """ValueError unless `groups` is a power of two up to REACH + 1."""
    if isinstance(groups, bool) or not 1 <= groups <= REACH + 1 or groups & (groups - 1):
        raise ValueError(f"groups is {groups!r}; expected 1 (off), 2, 4 and so on; {REACH + 1} is one by one.")


@lru_cache(maxsize=64)
@plain_tensors()
def layout(plan: DecodePlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(T, n) int64, the cells of every step, 0 where there are fewer; (T, n) bool, where there are some; (N,) int64,
    where each cell stands in that."""
    table = nn.utils.rnn.pad_sequence(list(plan.cells_of_step), batch_first=True, padding_value=-1)
    held = table >= 0
    return (
        table.clamp_min(0).to(device),
        held.to(device),
        held.flatten().nonzero()[:, 0][plan.order.argsort()].to(device),
    )


@lru_cache(maxsize=64)
@plain_tensors()
def even_turns(groups: int, n: int, device: torch.device) -> Tensor:
    """(n,) int64: at which turn the k-th of n cells is drawn."""
    return torch.tensor(turns(groups)).argsort().repeat(-(-n // groups))[:n].to(device)


class IntraHead(nn.Module):
    """See the top of this file.

    Args:
        groups: of a diagonal while decoding and scoring. 1 = off.
        alone: everything else in the model is frozen.
    """

    def __init__(self, dim: int, groups: int = 2, alone: bool = False) -> None:
        super().__init__()
        check_groups(groups)
        self.groups, self.alone = groups, alone
        channels = PATTERNS * -(-dim // (2 * PATTERNS))
        self.states = nn.Linear(2 * dim, 2 * channels)  # A with b, and U
        self.code = nn.Linear(dim, channels)  # E with e
        self.near = nn.Parameter(torch.empty(2, 2 * REACH + 1, PATTERNS))  # k and l
        self.out = nn.Linear(channels, dim, bias=False)  # W
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights: no effect, cells count by the inverse of their distance."""
        self.states.reset_parameters()
        self.code.reset_parameters()
        nn.init.zeros_(self.out.weight)
        distance = torch.arange(-REACH, REACH + 1, device=self.near.device).abs().clamp_min(1)
        with torch.no_grad():
            self.near.normal_().div_(distance[:, None])

    def config(self) -> dict[str, Any]:
        """Options of an equal one."""
        return {"groups": self.groups, "alone": self.alone}

    def parts(self, n: int) -> list[slice]:
        """The cells of each group of a diagonal of n, in their order, groups without cells left out."""
        return [slice(first, n, self.groups) for first in turns(self.groups) if first < n]

    def _near(self, n: int) -> Tensor:
        """(2, n, n, K): k and l for the cell of a row and that of a column."""
        at = torch.arange(n, device=self.near.device)
        distance = at - at[:, None]
        return self.near[:, distance.clamp(-REACH, REACH) + REACH] * (distance.abs() <= REACH)[..., None]

    def _turns(self, held: Tensor) -> Tensor:
        """(T or 1, n): when each cell is drawn; random while training: any groups, or half the time even ones."""
        if not self.training:
            return even_turns(self.groups, held.shape[1], held.device)[None]
        groups = 2 ** torch.randint(1, MOST.bit_length(), (len(held), 1), device=held.device)  # (T, 1)
        even = even_turns(MOST, held.shape[1], held.device) // (MOST // groups)
        random = (torch.rand(held.shape, device=held.device) * groups).long()
        return torch.where(torch.rand(groups.shape, device=held.device) < 0.5, even, random)

    def _code(self, x: Tensor) -> Tensor:
        """(R, n, K, C / K) of embedded codes (R, n, D)."""
        return self.code(rms_norm(x, x.shape[-1:], eps=1e-8)).unflatten(-1, (PATTERNS, -1))

    def forward(self, s: Tensor, x: Tensor, plan: DecodePlan) -> Tensor:
        """delta (R, N, D) for the states s (R, N, 2D) that predict each cell, and embedded codes x (R, N, D).

        0 for the only cell of a step.
        """
        table, held, place = layout(plan, s.device)
        own, other = self.states(s).chunk(2, dim=-1)  # (R, N, C)
        turn = self._turns(held)
        seen = (turn[:, :, None] > turn[:, None]) & held[:, None]  # (T, n, n): row sees column
        near_state, near_code = self._near(table.shape[1]).to(own.dtype)
        other = (other[:, table] * held[..., None]).unflatten(-1, (PATTERNS, -1))  # (R, T, n, K, C / K)
        code = self._code(x)[:, table]
        told = torch.einsum("rtjkc,ijk->rtikc", other, near_state)
        told = told + torch.einsum("rtjkc,tijk->rtikc", code, seen[..., None] * near_code)
        delta = self.out(silu(own + told.flatten(3).flatten(1, 2)[:, place]))
        return delta * (held.sum(1) > 1)[plan.on("step", s.device)][:, None]

    def meet(self, s: Tensor) -> Tensor:
        """What the cells of a step know before any is drawn, (R, n, C), for the states s (R, n, 2D)."""
        own, other = self.states(s).chunk(2, dim=-1)
        near = self._near(s.shape[1])[0].to(own.dtype)
        return own + torch.einsum("rjkc,ijk->rikc", other.unflatten(-1, (PATTERNS, -1)), near).flatten(2)

    def tell(self, known: Tensor, cells: slice, x: Tensor) -> Tensor:
        """`known` (R, n, C) after the embedded codes x (R, m, D) of some cells of the step."""
        near = self._near(known.shape[1])[1, :, cells].to(known.dtype)  # (n, m, K)
        return known + torch.einsum("rjkc,ijk->rikc", self._code(x), near).flatten(2)

    def delta(self, known: Tensor) -> Tensor:
        """delta (R, m, D) of cells that know `known` (R, m, C)."""
        return self.out(silu(known))
