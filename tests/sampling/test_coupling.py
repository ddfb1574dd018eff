"""Systematic coupling: every cell keeps its distribution, and cells leave their modes together as seldom as can be."""

import pytest
import tiny
import torch

from flashar_pl.decoding import Engine, generate
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import draw_coupled


def test_every_cell_keeps_its_distribution() -> None:
    """Guards the marginals: chi-squared with 4 degrees of freedom exceeds 23.5 once in 10,000 times."""
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(6, 5, generator=generator) * 2).softmax(-1)
    n = 50_000
    uniform = torch.rand(n, 6, generator=generator, dtype=torch.float64)
    codes = draw_coupled(weights.expand(n, -1, -1), uniform)
    for cell in range(6):
        expected = weights[cell].double() * n
        found = torch.bincount(codes[:, cell], minlength=5)
        assert float(((found - expected) ** 2 / expected).sum()) < 23.5


def test_few_leave_their_mode_together() -> None:
    """Guards the coupling itself: where cells leave 0.9 times in the mean, two never do."""
    n, weights = 2_000, torch.tensor([0.7, 0.2, 0.1]).expand(3, 3)
    uniform = torch.rand(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left = (draw_coupled(weights.expand(n, -1, -1), uniform) != 0).sum(1)
    assert int(left.max()) == 1
    assert abs(float(left.double().mean()) - 0.9) < 0.05


@torch.no_grad()
def test_it_is_an_option_of_the_diagonal_plan() -> None:
    """Guards an option that does nothing, and one that is ignored where it can do nothing."""
    model = tiny.flashar()
    plain, coupled, again = (
        generate(model, tiny.classes(4), (4, 5), seeds=0, coupling=coupling)
        for coupling in ("independent", "systematic", "systematic")
    )
    assert torch.equal(coupled, again)
    assert not torch.equal(plain, coupled)
    assert torch.equal(plain[:, 0, 0], coupled[:, 0, 0])  # alone on its diagonal
    with pytest.raises(ValueError, match="coupling is systematic, and a FlashAR model with the raster plan"):
        Engine(model, "eager").generate(tiny.classes(2), (4, 4), "raster", coupling="systematic")
    with pytest.raises(ValueError, match="coupling is 'shared'; expected one of independent, systematic"):
        SamplingSettings(coupling="shared")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="greedy"):
        SamplingSettings(coupling="systematic", greedy=True)
