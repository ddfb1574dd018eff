"""Samples that are all alike, or nearly: their distances have values, and a metric without one is left out."""

import itertools

import pytest
import torch

from flashar_pl.metrics import table
from flashar_pl.metrics.distribution import frechet_distance, frechet_distance_from_moments
from flashar_pl.metrics.extractor import Features
from flashar_pl.metrics.reference import Moments, ReferenceStatistics

KINDS = list(itertools.product((4, 16, 64), (0.1, 1.0, 30.0), (50, 200, 1000)))


def alike(columns: int, scale: float, n: int) -> torch.Tensor:
    return (scale * torch.rand(columns)).repeat(n, 1)  # (n, d)


@pytest.mark.parametrize("jitter", [0.0, 1e-6])
def test_identical_features_of_every_scale(jitter: float) -> None:
    """The distance of one point from a cloud: |mu1 - mu2|^2 + tr S2."""
    for columns, scale, n in KINDS:
        rows, real = alike(columns, scale, n), torch.randn(200, columns)
        rows = rows + jitter * scale * torch.randn(n, columns)
        samples, reference = Moments.of(rows).statistics(), Moments.of(real).statistics()
        offset, spread = (samples[0] - reference[0]).square().sum(), reference[1].trace()
        expected = pytest.approx(float(offset + spread), rel=1e-4)
        assert frechet_distance_from_moments(*samples[:2], *reference[:2]) == expected
        assert frechet_distance(rows, real) == expected


def test_a_reference_of_uncentred_moments_in_single_precision() -> None:
    """E[x x^T] - mean mean^T in float32, as other tools write it, is no covariance by its own scale."""
    for columns, scale, n in KINDS:
        rows = alike(columns, scale, n)
        mean = rows.mean(0)
        covariance = rows.T @ rows / n - torch.outer(mean, mean)
        assert frechet_distance_from_moments(mean, covariance, mean, covariance) <= 1e-4 * scale**2 * columns


def test_a_metric_without_a_value_leaves_the_others() -> None:
    pool = torch.randn(20, 6)
    no_covariance = ReferenceStatistics(torch.zeros(6).numpy(), -torch.eye(6).numpy(), features=pool.numpy())
    found, missing = table.measure(["fid", "precision"], Features(pool), no_covariance)
    assert found == {"precision": 1.0}
    assert "not a covariance" in missing["fid"]
    far = ReferenceStatistics(torch.full((6,), 1e200, dtype=torch.float64).numpy(), torch.eye(6).double().numpy())
    assert table.measure(["fid"], Features(pool), far)[1]["fid"].startswith("it is inf")
