"""The streaming Fréchet distance: moments, reference, extractor, dtype, refusals, and two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flashar_pl.metrics.distribution import frechet_distance
from flashar_pl.metrics.fid import FrechetDistance


def gaussian(rows: int, seed: int, columns: int = 6) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Channels(nn.Module):
    """Six features of an image: mean and spread of each channel."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().flatten(2) * self.weight
        return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)


def filled(real: torch.Tensor, fake: torch.Tensor, **options: object) -> FrechetDistance:
    metric = FrechetDistance(real.shape[1], **options)
    for part in real.split(17):
        metric.update_features(part, real=True)
    for part in fake.split(13):
        metric.update_features(part, real=False)
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
    metric.update_features(torch.cat([fake[20:], gaussian(5, 3) * 100]), real=False, valid=valid)
    assert float(metric.compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_update_after_compute_is_seen():
    """torchmetrics caches the result; features that bypass its update wrapper would be ignored."""
    metric = filled(gaussian(40, 1), gaussian(30, 2))
    first = float(metric.compute())
    metric.update_features(gaussian(30, 3) + 5, real=False)
    assert float(metric.compute()) > first + 1


@pytest.mark.parametrize("forget", [False, True])
def test_reset_keeps_real_rows_unless_told(forget):
    metric = filled(gaussian(40, 1), gaussian(30, 2), reset_real_features=forget)
    metric.reset()
    assert metric.has_reference is not forget
    metric.update_features(gaussian(25, 3), real=False)
    if forget:
        with pytest.raises(ValueError, match="0 real samples"):
            metric.compute()
    else:
        assert float(metric.compute()) == pytest.approx(frechet_distance(gaussian(25, 3), gaussian(40, 1)), rel=1e-9)


def test_reference_moments_survive_reset_and_replace_rows():
    real, fake = gaussian(60, 1).numpy(), gaussian(50, 2)
    metric = FrechetDistance(6, reset_real_features=True)
    metric.set_reference(real.mean(axis=0), np.cov(real, rowvar=False), n=60)
    for _ in range(2):
        metric.reset()
        metric.update_features(fake, real=False)
        assert float(metric.compute()) == pytest.approx(frechet_distance(fake, real), rel=1e-9)
    with pytest.raises(ValueError, match="reference moments are set"):
        metric.update_features(fake, real=True)
    metric.clear_reference()
    metric.update_features(fake, real=True)
    assert float(metric.compute()) == 0.0
    with pytest.raises(ValueError, match="already added"):
        metric.set_reference(np.zeros(6), np.eye(6))


def test_sums_stay_float64_and_the_extractor_stays_outside():
    """A bf16 model must not turn the sums or Inception to half, nor save it or train it."""
    extractor = Channels()
    owner = nn.ModuleDict({"fid": FrechetDistance(extractor)}).half().bfloat16()
    metric = owner["fid"]
    metric.set_dtype(torch.float16)
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metric.update(images, real=True)
    metric.update(images.flip(1), real=False)
    assert metric.real_features_sum.dtype == metric.fake_features_cov_sum.dtype == torch.float64
    assert extractor.weight.dtype == torch.float32
    assert not list(owner.parameters())
    assert not owner.state_dict()
    assert float(metric.compute()) == pytest.approx(
        frechet_distance(extractor(images.flip(1)).double().detach(), extractor(images).double().detach()), rel=1e-9
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update_features(torch.zeros(4, 5), real=True), r"float features \(B, 6\)"),
        (lambda m: m.update_features(torch.zeros(6), real=True), r"shape \(B, 6\)"),
        (lambda m: m.update_features(torch.full((2, 6), torch.inf), real=True), "NaN or infinity"),
        (lambda m: m.update(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), real=True), "without an extractor"),
        (lambda m: m.set_reference(np.zeros(5), np.eye(5)), "5 columns, the metric has 6"),
        (lambda m: FrechetDistance(nn.Linear(2, 2)), "integer num_features"),
        (lambda m: FrechetDistance(4, min_samples=1), "at least 2"),
        (lambda m: FrechetDistance(Channels()).update(torch.zeros(2, 3, 4, 4), real=True), "must be uint8"),
    ],
)
def test_bad_input_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(FrechetDistance(6))


def test_too_few_samples_are_refused_and_singular_ones_warned_about():
    metric = filled(gaussian(40, 1), gaussian(30, 2), min_samples=31)
    with pytest.raises(ValueError, match=r"30 generated samples are too few.*at least 31"):
        metric.compute()
    with pytest.warns(UserWarning, match="5 rows for 6 features"):
        filled(gaussian(40, 1), gaussian(5, 2)).compute()


def test_two_ranks_equal_one(tmp_path):
    """Odd counts, uneven ranks, a short last batch, a rank without rows: see metrics_two_ranks.py."""
    script = Path(__file__).with_name("metrics_two_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == 2
