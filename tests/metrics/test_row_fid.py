"""FID of a validation: torchmetrics' metric over rows equals the formula, with stored moments too."""

import numpy as np
import pytest
import torch

from flashar_pl.metrics.distribution import frechet_distance
from flashar_pl.metrics.fid import RowFID
from flashar_pl.metrics.reference import ReferenceStatistics


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + seed


def test_batches_and_a_reset_give_the_formula() -> None:
    """Real rows stay over a reset; generated ones of the validation before must not."""
    real, fake = rows(40, 1), rows(30, 2)
    metric = RowFID(5)
    for part in real.split(7):
        metric.update(part, real=True)
    metric.update(rows(9, 3), real=False)
    metric.reset()
    for part in (*fake.split(11), fake[:0]):
        metric.update(part, real=False)
    assert float(metric.compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


@pytest.mark.parametrize("n", [40, None])
def test_stored_moments_are_the_real_side_of_the_first_rank(n: int | None) -> None:
    """Summed over two ranks they must be those of one; None: ADM references do not say how many images there were."""
    real, fake = rows(40, 1), rows(30, 2)
    reference = ReferenceStatistics(real.numpy().mean(0), np.cov(real.numpy(), rowvar=False), n)
    ranks = [RowFID(5), RowFID(5)]
    for rank, metric in enumerate(ranks):
        metric.set_reference(reference, rank)
        metric.update(fake[rank::2], real=False)
        assert metric.has_real
    for name in ranks[0].metric_state:  # what torchmetrics does between processes
        setattr(ranks[0], name, getattr(ranks[0], name) + getattr(ranks[1], name))
    assert float(ranks[0].compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="moments of 3 features; expected 5"):
        RowFID(5).set_reference(ReferenceStatistics(np.zeros(3), np.eye(3), 9), 0)
    with pytest.raises(ValueError, match="NaN"):
        RowFID(5).update(torch.full((2, 5), float("nan")), real=False)
