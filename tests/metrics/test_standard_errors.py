"""Standard errors over images and two levels of seeds: against known quantiles, by hand, and by simulation."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from flashar_pl.metrics.distribution import frechet_distance_from_moments, frechet_standard_error
from flashar_pl.metrics.geneval import summarise
from flashar_pl.metrics.intervals import Estimate, difference, mean_of, nested, share, students_t


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (math.inf, 1.95996)]
)
def test_students_t(degrees, t):
    """Published two-sided 95 % quantiles."""
    assert students_t(degrees) == pytest.approx(t, rel=2e-5)


def test_nested_by_hand():
    """Two pre-trained models, two adaptations each, two images."""
    runs = {("p", "0"): [1.0, 3.0], ("p", "1"): [3.0, 5.0], ("q", "0"): [5.0, 7.0], ("q", "1"): [7.0, 9.0]}
    found = nested({key: np.array(value) for key, value in runs.items()})
    # run means 2, 4 | 6, 8: s^2 within 2; means 3 and 7: s^2 = 8, so P has 8 - 2 / 2 = 7; images 4 and 6: s^2 = 2
    assert found.mean == 5.0
    assert found.levels["pretraining"] == {"seeds": 2, "standard_deviation": pytest.approx(math.sqrt(7))}
    assert found.levels["adaptation"] == {"seeds": 4, "standard_deviation": pytest.approx(math.sqrt(2))}
    assert found.estimate.standard_error == pytest.approx(math.sqrt(8 / 2 + 2 / 2))
    assert found.estimate.degrees == pytest.approx((4 + 1) ** 2 / (4**2 + 1**2))


def test_intervals_cover_the_truth():
    """Guards an error that treats adaptations of one model as independent: it would cover far less than 95 %."""
    numbers, inside, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        image = numbers.normal(size=50)
        runs = {}
        for p in range(3):
            outer = numbers.normal()
            for a in range(4):
                runs[str(p), str(a)] = 2.0 + outer + 0.2 * numbers.normal() + 0.5 * image
        found = nested(runs).estimate
        inside += abs(found.value - 2.0) < found.half
        means = [values.mean() for values in runs.values()]
        naive += abs(np.mean(means) - 2.0) < students_t(11) * np.std(means, ddof=1) / math.sqrt(12)
    assert 0.92 <= inside / 300 <= 0.99
    assert naive / 300 < 0.85


def test_differences_are_paired_as_far_as_the_seeds_are_shared():
    numbers = np.random.default_rng(1)
    images = numbers.normal(size=40) * 10
    models = {p: numbers.normal() for p in "pqr"}
    ours = {(p, a): images + models[p] + 0.1 for p in "pqr" for a in "01"}
    other = {(p, a): images + models[p] for p in "pqr" for a in "01"}
    before = {(p, ""): images + models[p] - 1 for p in "pqr"}
    apart, paired = difference(ours, other)
    assert (paired, apart.mean) == ("runs", pytest.approx(0.1))
    assert apart.estimate.standard_error == pytest.approx(0, abs=1e-12)
    apart, paired = difference(ours, before)
    assert (paired, apart.mean) == ("pretraining", pytest.approx(1.1))
    assert apart.estimate.standard_error == pytest.approx(0, abs=1e-12)
    apart, paired = difference(ours, {("x", ""): images, ("y", ""): images + 1})
    assert paired == "images"
    spread = np.var([models[p] + 0.1 for p in "pqr"], ddof=1) / 3 + 0.5 / 2
    assert apart.estimate.standard_error == pytest.approx(math.sqrt(spread))


def test_what_one_seed_cannot_say_is_left_out():
    one = nested({("p", "0"): np.array([1.0, 2.0, 3.0])})
    assert one.levels["pretraining"]["standard_deviation"] is None
    assert one.levels["adaptation"]["standard_deviation"] is None
    assert one.estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert Estimate(1.0, None).plain()["interval_95"] is None


def test_shares_of_prompts():
    """Four images of a prompt that agree are one observation, not four."""
    found = share([[True] * 4, [False] * 4, [True] * 4])
    assert found.value == pytest.approx(2 / 3)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    both = mean_of([found, found])
    assert both.standard_error == pytest.approx(found.standard_error / math.sqrt(2))
    assert both.degrees == pytest.approx(4)
    assert mean_of([found, share([[True]])]).standard_error is None
    assert Estimate(0.0, 1.0, math.inf).half == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-5)


def test_the_standard_error_of_a_distance_is_that_of_its_draws():
    """Against the spread over independent draws, and the first-order change of the distance by one more sample."""
    numbers = np.random.default_rng(0)
    mixed = numbers.normal(size=(6, 6))
    reference = numbers.normal(size=(5000, 6)) @ mixed + 0.5
    mu, sigma = reference.mean(0), np.cov(reference.T)
    draws = [numbers.normal(size=(400, 6)) @ mixed * 1.3 for _ in range(150)]
    spread = np.std([frechet_distance_from_moments(x.mean(0), np.cov(x.T), mu, sigma) for x in draws])
    told = [frechet_standard_error(x, mu, sigma) for x in draws]
    assert np.mean(told) == pytest.approx(spread, rel=0.15)
    assert np.std(told) < 0.2 * spread


def test_the_influence_of_a_sample_is_the_derivative():
    """Mixing a share e of one sample into the moments changes the distance by e times what the formula says."""
    numbers = np.random.default_rng(1)
    x, sigma = numbers.normal(size=(60, 4)), np.diag([1.0, 2.0, 0.5, 3.0])
    mu, e = np.array([0.3, 0.0, -0.2, 0.1]), 1e-5
    m, s = x.mean(0), np.cov(x.T)
    slopes = []
    for row in x:
        moved = (1 - e) * s + e * (1 - e) * np.outer(row - m, row - m)
        mean = m + e * (row - m)
        change = frechet_distance_from_moments(mean, moved, mu, sigma) - frechet_distance_from_moments(m, s, mu, sigma)
        slopes.append(change / e)
    assert frechet_standard_error(x, mu, sigma) == pytest.approx(np.std(slopes, ddof=1) / 60**0.5, rel=1e-4)


def test_errors_of_a_geneval_table():
    """Two tasks, two prompts each, two images a prompt; guards an error that counts images."""
    right = {("a", "x"): [1, 1], ("a", "y"): [0, 0], ("b", "x"): [1, 0], ("b", "y"): [1, 1]}
    found = summarise([({"tag": tag, "prompt": text}, bool(ok)) for (tag, text), own in right.items() for ok in own])
    assert (found.overall, found.prompts) == (pytest.approx((0.5 + 0.75) / 2), 4)
    assert found.standard_errors["a"] == pytest.approx(0.5)
    assert found.standard_errors["b"] == pytest.approx(0.25)
    assert found.standard_errors["overall"] == pytest.approx(math.sqrt(0.5**2 + 0.25**2) / 2)
