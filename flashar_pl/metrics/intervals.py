"""Standard errors: of likelihoods over images and two levels of seeds, of distances, and of shares.

Shapes: N images, n samples, d features. Runs are named by (pre-training, adaptation) seed; everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import Any

import numpy as np

LEVEL = 0.95
"""Of every interval."""
Runs = Mapping[tuple[str, str], np.ndarray]
"""(pre-training seed, adaptation seed) -> a value for each image (N,)."""


def students_t(degrees: float, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = level for any degrees of freedom > 0.

    With T = sqrt(degrees) tan(u) the density is proportional to cos(u)^(degrees - 1), which is summed over midpoints;
    above 10,000 degrees it is normal to 1 in 10,000.
    """
    if degrees > 10_000:
        return NormalDist().inv_cdf((1 + level) / 2)
    edges = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1)
    inside = np.concatenate([[0.0], np.cumsum(density)])
    return math.sqrt(degrees) * math.tan(float(np.interp(level * inside[-1], inside, edges)))


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share of which k of n were seen (Wilson, 1927)."""
    z, p = NormalDist().inv_cdf((1 + level) / 2), k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return 0.0 if k == 0 else (centre - half) / scale, 1.0 if k == n else (centre + half) / scale


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it may be off."""

    value: float
    standard_error: float | None
    """None = there is one value only."""
    degrees: float | None = None
    """Degrees of freedom of the standard error."""

    @property
    def half(self) -> float | None:
        """Half the width of the interval at `LEVEL`."""
        if self.standard_error is None or self.degrees is None:
            return None
        return students_t(self.degrees) * self.standard_error

    def plain(self) -> dict[str, Any]:
        """Plain values for a report; degrees of freedom None where no value differs, and the interval has no width."""
        interval = None if self.half is None else [self.value - self.half, self.value + self.half]
        known = self.degrees is not None and math.isfinite(self.degrees)
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "degrees_of_freedom": self.degrees if known else None,
            "interval_95": interval,
        }


Part = tuple[float, int]
"""Share of the variance of a mean, and its degrees of freedom."""


@dataclass(frozen=True)
class Nested:
    """A mean, and the independent parts of its variance."""

    mean: float
    seeds: list[Part]
    images: list[Part]
    levels: dict[str, dict[str, Any]]
    """Level -> how many there are, and their standard deviation, None = not known."""

    @property
    def estimate(self) -> Estimate:
        """Over seeds and images."""
        return combine(self.mean, [*self.seeds, *self.images])


def combine(mean: float, parts: Sequence[Part]) -> Estimate:
    """Standard error sqrt(sum v); degrees of freedom (sum v)^2 / sum(v^2 / f) (Welch and Satterthwaite)."""
    total, each = sum(v for v, _ in parts), sum(v * v / f for v, f in parts)
    return Estimate(mean, math.sqrt(total), total**2 / each if each else math.inf) if parts else Estimate(mean, None)


def nested(runs: Runs) -> Nested:
    """Mean over images and runs, with a standard error that covers images and both levels of seeds.

    The value of image i under the run with pre-training seed p and adaptation seed a is taken as
        y[p, a, i] = mean + P[p] + A[p, a] + I[i] + rest,
    A nested in P, I crossed with both: all runs see the same images. With m[p] the mean over images and adaptation
    seeds, r[i] the mean over runs, and s^2 sample variances,
        variance of the mean = s^2(m) / (pre-training seeds) + s^2(r) / N.
    s^2(m) holds the spread of P and, divided by their number, that of A. The rest is counted twice, which errs on the
    safe side. With one pre-training seed its spread is unknown: the first term is s^2 over adaptation seeds, divided by
    their number, and the interval holds for that one model; with one run it is left out. Degrees of freedom: `combine`.
    """
    groups: dict[str, list[float]] = {}
    for (p, _), values in runs.items():
        groups.setdefault(p, []).append(float(np.mean(values)))
    means = [fmean(own) for own in groups.values()]
    freedom = sum(len(own) - 1 for own in groups.values())
    squares = sum(variance(own) * (len(own) - 1) for own in groups.values() if len(own) > 1)
    inner = squares / freedom if freedom else None  # of A
    below = 0.0 if inner is None else inner * fmean(1 / len(own) for own in groups.values())  # what m has of A
    outer = max(0.0, variance(means) - below) if len(means) > 1 else None  # of P
    over = means if len(means) > 1 else next(iter(groups.values()))
    images = _part(np.mean(list(_by_pretraining(runs).values()), axis=0))
    levels = {
        "pretraining": {"seeds": len(groups), "standard_deviation": None if outer is None else math.sqrt(outer)},
        "adaptation": {"seeds": sum(a != "" for _, a in runs), "standard_deviation": inner and math.sqrt(inner)},
        "images": {
            "images": len(next(iter(runs.values()))),
            "standard_error": math.sqrt(images[0][0]) if images else None,
        },
    }
    return Nested(fmean(means), _part(over), images, levels)


def _part(values: Any) -> list[Part]:
    """Of the variance of the mean of independent values (n,); none of a single one."""
    return [(float(np.var(values, ddof=1)) / len(values), len(values) - 1)] if len(values) > 1 else []


def difference(ours: Runs, other: Runs) -> tuple[Nested, str]:
    """Mean of ours - other on the same images, and what was paired.

    "runs": both have the same seeds at both levels, as two ways of adapting the same models; "pretraining": the same
    pre-trained models, means over the adaptations of each; "images": models that share no seed, where the variance over
    seeds is the sum of both sides'. Images are always paired.
    """
    if set(ours) == set(other):
        return nested({key: ours[key] - other[key] for key in ours}), "runs"
    left, right = (_by_pretraining(runs) for runs in (ours, other))
    if set(left) == set(right):
        return nested({(p, ""): left[p] - right[p] for p in left}), "pretraining"
    one, two = nested(ours), nested(other)
    images = np.mean(list(left.values()), axis=0) - np.mean(list(right.values()), axis=0)  # (N,)
    return Nested(one.mean - two.mean, one.seeds + two.seeds, _part(images), {}), "images"


def _by_pretraining(runs: Runs) -> dict[str, np.ndarray]:
    """Mean over adaptations (N,) for each pre-trained model."""
    groups: dict[str, list[np.ndarray]] = {}
    for (p, _), values in runs.items():
        groups.setdefault(p, []).append(np.asarray(values, np.float64))
    return {p: np.mean(own, axis=0) for p, own in groups.items()}


def share(groups: Sequence[Sequence[bool]]) -> Estimate:
    """Mean of the shares of successes in groups, such as the images of one prompt, which are not independent.

    standard error = s(shares) / sqrt(groups): that of a cluster sample. It is 0 where all groups agree, which says that
    there are too few, not that the share is exact.
    """
    shares = [fmean(map(float, own)) for own in groups]
    error = math.sqrt(variance(shares) / len(shares)) if len(shares) > 1 else None
    return Estimate(fmean(shares), error, None if error is None else len(shares) - 1)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates: standard error sqrt(sum of squares) / their number; None where one is
    not known."""
    parts = [
        ((each.standard_error / len(estimates)) ** 2, round(each.degrees))
        for each in estimates
        if each.standard_error is not None and each.degrees
    ]
    return combine(fmean(each.value for each in estimates), parts if len(parts) == len(estimates) else [])
