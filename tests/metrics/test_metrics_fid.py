"""The streaming Fréchet distance: moments, reference, extractor, dtype, refusals, and two ranks."""

import numpy as np
import pytest
import torch
from metrics_two_ranks import measured, measured_by_rank
from pair import Pair

from flashar_pl.metrics.distribution import frechet_distance
from flashar_pl.metrics.fid import FrechetDistance


def gaussian(rows: int, seed: int, columns: int = 6) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(real: torch.Tensor, fake: torch.Tensor) -> FrechetDistance:
    metric = FrechetDistance(real.shape[1])
    for part in real.split(17):
        metric.update(part, real=True)
    for part in fake.split(13):
        metric.update(part, real=False)
    return metric


def test_streaming_equals_rows_form():
    real, fake = gaussian(101, 1), gaussian(90, 2) * 2 + 100.0
    value = filled(real, fake).compute()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_padded_rows_are_not_counted():
    real, fake = gaussian(40, 1), gaussian(30, 2)
    metric = filled(real, fake[:20])
    valid = torch.tensor([True] * 10 + [False] * 5)
    metric.update(torch.cat([fake[20:], gaussian(5, 3) * 100]), real=False, valid=valid)
    assert float(metric.compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_update_after_compute_is_seen():
    """torchmetrics caches the result; features that bypass its update wrapper would be ignored."""
    metric = filled(gaussian(40, 1), gaussian(30, 2))
    first = float(metric.compute())
    metric.update(gaussian(30, 3) + 5, real=False)
    assert float(metric.compute()) > first + 1


def test_reset_keeps_real_rows():
    metric = filled(gaussian(40, 1), gaussian(30, 2))
    metric.reset()
    assert metric.has_reference
    metric.update(gaussian(25, 3), real=False)
    assert float(metric.compute()) == pytest.approx(frechet_distance(gaussian(25, 3), gaussian(40, 1)), rel=1e-9)


def test_reference_moments_survive_reset_and_replace_rows():
    real, fake = gaussian(60, 1).numpy(), gaussian(50, 2)
    metric = FrechetDistance(6)
    metric.set_reference(real.mean(axis=0), np.cov(real, rowvar=False), n=60)
    for _ in range(2):
        metric.reset()
        metric.update(fake, real=False)
        assert float(metric.compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_sums_stay_float64():
    """A bf16 model must not turn the sums to half, nor save them."""
    owner = torch.nn.ModuleDict({"fid": FrechetDistance(6)}).half().bfloat16()
    metric = owner["fid"]
    metric.set_dtype(torch.float16)
    assert metric.real_sum.dtype == metric.fake_products.dtype == torch.float64
    assert not owner.state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update(torch.zeros(4, 5), real=True), r"expected float rows \(B, 6\)"),
        (lambda m: m.update(torch.zeros(6), real=True), r"expected float rows \(B, 6\)"),
        (lambda m: m.update(torch.full((2, 6), torch.inf), real=True), "NaN or infinity"),
        (lambda m: m.set_reference(np.zeros(5), np.eye(5)), "moments of 5 features; expected 6"),
        (lambda m: m.compute(), "0 generated samples are too few"),
    ],
)
def test_bad_input_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(FrechetDistance(6))


def test_singular_covariances_are_warned_about():
    with pytest.warns(UserWarning, match="5 rows for 6 features"):
        filled(gaussian(40, 1), gaussian(5, 2)).compute()


def test_two_ranks_equal_one(pair: Pair) -> None:
    """Odd counts, uneven ranks, a short last batch, a rank without rows."""
    expected = measured()
    assert set(expected[0]) == {"fid", "sfid", "is", "precision", "recall", "f1", "kid"}
    for found in pair(measured_by_rank):
        assert found == [pytest.approx(each, rel=1e-9) for each in expected]
