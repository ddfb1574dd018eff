"""Closed forms, invariances and error messages of the distribution metrics."""

import numpy as np
import pytest
import torch

from flashar_pl.metrics.distribution import (
    f1_score,
    frechet_distance,
    frechet_distance_from_moments,
    inception_score,
    kernel_distance,
    precision_recall,
)


def gaussian(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_gaussians_in_closed_form():
    """Commuting covariances: |mu|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = np.linspace(0.5, 4, 12), np.linspace(3, 0.1, 12)
    rotation = np.linalg.qr(np.random.RandomState(0).randn(12, 12))[0]
    value = frechet_distance_from_moments(
        np.full(12, 0.5), rotation * a @ rotation.T, np.zeros(12), rotation * b @ rotation.T
    )
    assert value == pytest.approx(12 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("rows", [5, 8, 9, 40])
def test_rows_form_equals_moments_form(rows):
    """Few rows take the row factor, many the covariance: both must be the same number."""
    x, y = gaussian(rows, 8, 1), gaussian(30, 8, 2, 2.0) + 1
    moments = [(z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y)]
    assert frechet_distance(x, y) == pytest.approx(frechet_distance_from_moments(*moments[0], *moments[1]), rel=1e-10)


@pytest.mark.parametrize("rows", [6, 60])
def test_order_swap_and_shift(rows):
    x, y = gaussian(rows, 10, 3), gaussian(50, 10, 4, 1.5)
    value = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(x.flip(0), y.roll(7, 0)) == pytest.approx(value, rel=1e-12)
    shifted = frechet_distance(x, x + 3.0)
    assert shifted == pytest.approx(10 * 9.0, rel=1e-9)
    assert frechet_distance(x, x) == 0.0


def test_numpy_and_tensors_and_blocks_agree(monkeypatch):
    """Guards nearest neighbours block by block."""
    x, y = gaussian(103, 6, 5), gaussian(87, 6, 6) + 0.3
    whole = (frechet_distance(x, y), precision_recall(x, y), kernel_distance(x, y, 3, 50))
    monkeypatch.setattr("flashar_pl.metrics.precision_recall.ROW_BLOCK", 10)
    assert precision_recall(x.numpy(), y.numpy()) == whole[1]
    assert frechet_distance(x.numpy(), y.numpy()) == pytest.approx(whole[0], rel=1e-12)
    assert kernel_distance(x.numpy(), y.numpy(), 3, 50) == whole[2]


def test_read_only_and_reversed_arrays_are_taken(recwarn):
    """Guards against torch's warning about memory maps and its refusal of negative strides."""
    x, y = gaussian(20, 3, 5).numpy(), gaussian(30, 3, 6).numpy()
    expected = precision_recall(x, y)
    x.setflags(write=False)
    assert precision_recall(x, y[::-1]) == expected
    assert not recwarn.list


def test_precision_recall_against_the_definition():
    x, y = gaussian(40, 3, 7).numpy(), gaussian(50, 3, 8).numpy() + 0.5

    def balls(own: np.ndarray) -> np.ndarray:
        return np.array([sorted(((own - row) ** 2).sum(axis=1))[2] for row in own])

    inside_y = [any(((row - y) ** 2).sum(axis=1) <= balls(y)) for row in x]
    inside_x = [any(((row - x) ** 2).sum(axis=1) <= balls(x)) for row in y]
    assert precision_recall(x, y, k=2) == (np.mean(inside_y), np.mean(inside_x))
    assert precision_recall(x, x + 1000.0) == (0.0, 0.0)
    assert f1_score(0.0, 0.0) == 0.0
    assert f1_score(0.5, 1.0) == pytest.approx(2 / 3)


def test_copies_far_from_the_origin_have_distance_zero():
    """Without the rounding rule the matrix product gives copies a distance above 0, outside a ball of radius 0."""
    base = gaussian(1, 64, 9) * 100
    reference = torch.cat([base.repeat(5, 1), gaussian(5, 64, 10) + 500])
    samples = torch.cat([base + 1e-3, base.repeat(4, 1)])
    assert precision_recall(samples, reference)[0] == 0.8


def test_logits_and_probabilities_agree():
    logits = gaussian(30, 5, 11, 3.0)
    assert inception_score(logits) == pytest.approx(inception_score(logits.softmax(dim=1)), rel=1e-12)
    assert inception_score(logits.softmax(dim=1), kind="logits") != pytest.approx(inception_score(logits), rel=1e-3)
    assert inception_score(torch.eye(4) * 1e6) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(np.zeros(3), np.zeros((3, 1))), r"samples is \(3,\); expected \(rows, columns\)"),
        (lambda: frechet_distance(np.zeros((3, 2)), np.zeros((3, 4))), "2 columns, reference has 4"),
        (lambda: frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2))), "NaN or infinity in 3 of 3 rows"),
        (lambda: frechet_distance_from_moments(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "covariance"),
        (lambda: frechet_distance_from_moments(np.zeros(2), [[1, 1], [0, 1]], np.zeros(2), np.eye(2)), "symmetric"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), r"samples has 3 row\(s\).*at least 4"),
        (lambda: inception_score(np.zeros((3, 2)), 4), "expected 1 to 3, the number of rows"),
        (lambda: inception_score(np.zeros((3, 2)), kind="probs"), "not probabilities"),
        (lambda: kernel_distance(np.zeros((9, 2)), np.zeros((9, 2)), 1, 10), "expected 9 or less"),
    ],
)
def test_bad_input_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
