"""Improved precision and recall, and the distances between rows that they need.

Shapes: n samples, m reference rows, d feature columns, k neighbours, b rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashar_pl.metrics.rows import Array, check_pair
from flashar_pl.numerics import strict_float32

ROW_BLOCK = 512
"""Rows whose distances to all others are held at once."""
SAME_ROW = 1e-12
"""A squared distance below this share of |u|^2 + |v|^2 is rounding of the matrix product: the rows count as equal."""
SPARE = 12
"""Neighbours beyond the k-th among which rounding in float32 may hide another k-th; where it may hide more, float64 has
the whole row."""


def precision_recall(samples: Array, reference: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) as the ADM evaluator defines them.

    A row's ball reaches to its k-th nearest neighbour in its own set, the row itself being number 0. Precision is the
    share of samples (n, d) inside (<=) the ball of any reference row (m, d), recall the share of reference rows inside
    the ball of any sample. Distances are squared Euclidean, computed in float64 and rounded to float32, so that ties
    are ties; the original tries float16 first, which moves a few rows in a thousand. Products in float32, of which the
    greatest possible error is known, decide first; float64 has the rows that they leave undecided.

    Raises:
        ValueError: k < 1, fewer than k + 1 rows in either set, and as elsewhere.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more.")
    x, y = check_pair(samples, reference, minimum=k + 1)
    centre = x.double().mean(dim=0)
    x, y = x.double() - centre, y.double() - centre
    with strict_float32(x.device.type):
        u, v, doubt = _singles(x, y)
        radius_x, radius_y = _radii(x, u, k, doubt), _radii(y, v, k, doubt)  # (n,), (m,)
        beyond_x, beyond_y = _beyond(u, v, radius_x, radius_y)
    covered_x, covered_y = _covered(x, y, radius_y, beyond_x, doubt), _covered(y, x, radius_x, beyond_y, doubt)
    return float(covered_x.double().mean()), float(covered_y.double().mean())


def f1_score(precision: float, recall: float) -> float:
    """Harmonic mean of precision and recall, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@dataclass(frozen=True)
class _Singles:
    """Rows in float32, around a common centre and divided by a common scale, so that none is longer than 1."""

    rows: Tensor
    """(n, d)."""
    norms: Tensor
    """(n,) squared lengths."""
    scale: float
    """Of squared distances: those of the original rows over those of these."""


def _singles(x: Tensor, y: Tensor) -> tuple[_Singles, _Singles, float]:
    """Both sets, and the greatest error of a squared distance between their rows, or of one less a squared radius.

    A product of d terms errs by at most d eps |u| |v| (Higham, 2002, Eq. 3.5), with eps = 2^-24 and |u|, |v| <= 1;
    what the rows, norms and sums are rounded by is less than 64 eps.
    """
    scale = max(float(rows.square().sum(dim=1).max()) for rows in (x, y)) or 1.0
    both = [(rows / scale**0.5).float() for rows in (x, y)]
    first, second = (_Singles(rows, rows.double().square().sum(dim=1).float(), scale) for rows in both)
    return first, second, (2 * x.shape[1] + 64) * 2.0**-24


def _radii(rows: Tensor, singles: _Singles, k: int, doubt: float) -> Tensor:
    """Squared distance (n,) float32 from each row to its k-th nearest neighbour, itself being number 0.

    rows: (n, d) float64, `singles` in their precision. What is nearer than the k-th in float32 by twice the doubt is
    only counted.
    """
    found, n_near = [], min(k + 1 + SPARE, len(rows))
    for block, u, norms in zip(*(each.split(ROW_BLOCK) for each in (rows, singles.rows, singles.norms)), strict=True):
        rough = torch.addmm(singles.norms, u, singles.rows.T, alpha=-2).add_(norms[:, None])  # (b, n)
        near = rough.topk(n_near, largest=False)  # (b, n_near) ascending
        apart = near.values - near.values[:, k : k + 1]
        surely = (apart < -2 * doubt).sum(dim=1, keepdim=True)  # (b, 1)
        exact = torch.full_like(apart, torch.inf)
        row, place = (apart.abs() <= 2 * doubt).nonzero(as_tuple=True)
        exact[row, place] = (block[row] - rows[near.indices[row, place]]).square_().sum(dim=1).float()
        radius = exact.sort(dim=1).values.gather(1, k - surely)[:, 0]
        if n_near < len(rows) and (hidden := apart[:, -1] <= 2 * doubt).any():
            radius[hidden] = _distances(block[hidden], rows).topk(k + 1, largest=False).values[:, k]
        found.append(radius)
    return torch.cat(found)


def _beyond(u: _Singles, v: _Singles, radius_u: Tensor, radius_v: Tensor) -> tuple[Tensor, Tensor]:
    """How far each row of one set is outside the nearest ball of the other: (n,), (m,), scaled, below 0 inside."""
    reach_u, reach_v = ((w.norms - radius.double() / w.scale).float() for w, radius in ((u, radius_u), (v, radius_v)))
    first, second = [], torch.full_like(v.norms, torch.inf)
    for rows, norms, reach in zip(*(each.split(ROW_BLOCK) for each in (u.rows, u.norms, reach_u)), strict=True):
        apart = rows @ v.rows.T  # (b, m)
        first.append(torch.add(reach_v, apart, alpha=-2).amin(dim=1) + norms)
        second = torch.minimum(second, torch.add(reach[:, None], apart, alpha=-2).amin(dim=0))
    return torch.cat(first), second + v.norms


def _covered(rows: Tensor, centres: Tensor, radius: Tensor, beyond: Tensor, doubt: float) -> Tensor:
    """Whether each row (n, d) lies in a ball around any of the centres (m, d), of squared radius (m,): (n,) bool."""
    covered = beyond < 0
    for undecided in (beyond.abs() <= doubt).nonzero()[:, 0].split(ROW_BLOCK):
        covered[undecided] = (_distances(rows[undecided], centres) <= radius).any(dim=1)
    return covered


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) squared distances in float64, rounded to float32."""
    return torch.cat([squared_distances(a, part).float() for part in b.split(8 * ROW_BLOCK)], dim=1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 in float64; exactly 0 for equal rows."""
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    distance = norms - 2 * (a @ b.T)
    return distance.masked_fill_(distance <= SAME_ROW * norms, 0.0)
