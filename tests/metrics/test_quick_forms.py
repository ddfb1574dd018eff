"""The quick forms of metrics against the plain ones, where they may go wrong."""

import pytest
import torch
from torch import Tensor

from flashar_pl.metrics import distribution
from flashar_pl.metrics.distribution import frechet_distance_from_moments, kernel_distance, precision_recall
from flashar_pl.metrics.precision_recall import squared_distances


def draw(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def plain_precision_recall(x: Tensor, y: Tensor, k: int) -> tuple[float, float]:
    """By the definition, every distance in float64 and rounded to float32."""
    centre = x.double().mean(dim=0)
    x, y = x.double() - centre, y.double() - centre
    own = [squared_distances(rows, rows).float().sort(dim=1).values[:, k] for rows in (x, y)]
    apart = squared_distances(x, y).float()
    return (apart <= own[1]).any(1).double().mean().item(), (apart <= own[0][:, None]).any(0).double().mean().item()


GRID = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
SETS = {
    "gaussian": (draw(300, 40, 0), draw(250, 40, 1)),
    "blocks": (draw(600, 5, 2), draw(530, 5, 3) * 1.1),  # more rows than one block has
    "ties": (GRID, GRID[::2] + torch.tensor([1.0, 0.0, 0.0])),
    "duplicates": (draw(40, 6, 4).repeat(9, 1), draw(40, 6, 4)[:20].repeat(3, 1)),
    "outlier": (torch.cat([draw(200, 8, 5), torch.full((1, 8), 1e7)]), draw(200, 8, 6)),
    "offset": (draw(200, 8, 7) * 1e-3 + 500, draw(200, 8, 8) * 1e-3 + 500),
    "huge": (draw(50, 4, 9).double() * 1e150, draw(50, 4, 10).double() * 1e150),
    "constant": (torch.ones(30, 3), torch.ones(20, 3)),
}


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_those_of_float64(name):
    """Guards against a neighbour that float32 confuses with another, and ties that it breaks."""
    x, y = SETS[name]
    for k in (1, 3):
        assert precision_recall(x, y, k) == plain_precision_recall(x, y, k)


@pytest.mark.parametrize("decay", [0.0, 1.0, 6.0])
def test_frechet_of_covariances_equals_that_of_factors(decay, monkeypatch):
    """Guards the bound beyond which the quick form is not taken: from 6 decades on its smallest roots are rounding."""
    scale = torch.logspace(0, -decay, 30, dtype=torch.float64)
    rows = [draw(200, 30, seed).double() * scale for seed in (0, 1)]
    moments = [part for each in rows for part in (each.mean(0), each.T.cov())]
    quick = frechet_distance_from_moments(*moments)
    monkeypatch.setattr(distribution, "LOST", -1.0)
    assert quick == pytest.approx(frechet_distance_from_moments(*moments), rel=1e-12)


def test_float32_products_leave_the_kernel_distance():
    x, y = (draw(400, 64, seed).relu() for seed in (0, 1))
    expected = kernel_distance(x.double(), y.double(), subsets=5, subset_size=200)
    assert kernel_distance(x, y, subsets=5, subset_size=200) == pytest.approx(expected, abs=1e-9)
    assert kernel_distance(x.half(), y.half(), subsets=5, subset_size=200) == pytest.approx(expected, abs=1e-3)
