"""All metrics of a set of samples, and which of them are possible.

Shapes: n samples, D pooled features, S spatial features, C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError

from flashar_pl.metrics.distribution import (
    f1_score,
    frechet_distance_from_moments,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    precision_recall,
)
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.metrics.reference import Moments, ReferenceStatistics

NEIGHBOURS = 3
"""k of precision and recall."""
FEWEST = {**dict.fromkeys(("precision", "recall", "f1"), NEIGHBOURS + 1), "kid": 1000}
"""Metrics that compare feature rows, and the rows they need on either side; KID's subsets have as many."""

Metric = Callable[[Any, Any, Callable[[], tuple[float, float]]], float]
"""(features of the samples, reference, precision and recall of both) -> value."""
METRICS: dict[str, Metric] = {
    "fid": lambda seen, real, cover: _frechet(seen.pool, real.mu, real.sigma, real.n),
    "sfid": lambda seen, real, cover: _frechet(seen.spatial, real.mu_s, real.sigma_s, real.n),
    "is": lambda seen, real, cover: inception_score(seen.logits, kind="logits"),
    "precision": lambda seen, real, cover: cover()[0],
    "recall": lambda seen, real, cover: cover()[1],
    "f1": lambda seen, real, cover: f1_score(*cover()),
    "kid": lambda seen, real, cover: kernel_distance(seen.pool, real.features, subset_size=FEWEST["kid"]),
}
"""By the name that --metrics takes, in the order of reports. What one needs is `_problem`'s business."""


def measure(
    names: Sequence[str], samples: Features, reference: ReferenceStatistics
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of n samples, whose feature rows are in order, and those that have no value here, with the reason.

    names: of those that `choose_metrics` allows.
    """
    real: Any = reference
    cover = cache(lambda: precision_recall(samples.pool, real.features, NEIGHBOURS))
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in (name for name in METRICS if name in names):
        try:
            value = METRICS[name](samples, reference, cover)
        except (ValueError, LinAlgError) as error:
            missing[name] = str(error)
            continue
        if math.isfinite(value):
            found[name] = value
        else:
            missing[name] = f"it is {value}: the features are too large for its arithmetic"
    return found, missing


def standard_errors(metrics: dict[str, float], samples: Features, reference: ReferenceStatistics) -> dict[str, float]:
    """Of FID and sFID, by `frechet_standard_error`; a distance of 0 has no first order."""
    seen: Any = samples
    moments = {"fid": ("pool", "mu", "sigma"), "sfid": ("spatial", "mu_s", "sigma_s")}
    return {
        name: frechet_standard_error(getattr(seen, rows), getattr(reference, mu), getattr(reference, sigma))
        for name, (rows, mu, sigma) in moments.items()
        if metrics.get(name) and len(seen.pool) > 2
    }


def _frechet(rows: Tensor, mu: Any, sigma: Any, n: int | None) -> float:
    mean, covariance, count = Moments.of(rows).statistics()
    few = count if n is None else min(count, n)
    if few <= rows.shape[1]:
        warnings.warn(
            f"{few} rows for {rows.shape[1]} features: the covariance is singular and the distance biased upwards; "
            "compare only results of equal sample counts",
            stacklevel=4,
        )
    return frechet_distance_from_moments(mean, covariance, mu, sigma)


def choose_metrics(
    names: Sequence[str] | None,
    extractor: FeatureExtractor,
    reference: ReferenceStatistics,
    n: int,
    min_samples: int | None,
) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute, and those left out with the reason.

    Args:
        names: metrics asked for, which must all be possible; None = all that are.
        n: samples that will be drawn.
        min_samples: fewest samples, and reference images, for FID and sFID; None = more than they have features.

    Raises:
        ValueError: a metric asked for is not possible, or there are too few samples for FID or sFID.
    """
    unknown = sorted(set(names or ()) - set(METRICS))
    if unknown or (names is not None and not names):
        raise ValueError(f"metrics: unknown {', '.join(unknown) or 'empty list'}; expected of {', '.join(METRICS)}.")
    wanted = [name for name in METRICS if names is None or name in names]
    problems = {name: _problem(name, extractor, reference, n) for name in wanted}
    left_out = {name: problem for name, problem in problems.items() if problem is not None}
    if names is not None and left_out:
        listed = "; ".join(f"{name}: {problem}" for name, problem in left_out.items())
        raise ValueError(f"not possible: {listed}. Leave out of --metrics what is not possible.")
    chosen = [name for name in wanted if name not in left_out]
    for name, columns in (("fid", extractor.num_features), ("sfid", extractor.num_spatial)):
        if name in chosen:
            _check_counts(name, int(columns or 0), reference, n, min_samples)
    return chosen, left_out


def _problem(name: str, extractor: FeatureExtractor, reference: ReferenceStatistics, n: int) -> str | None:
    """Why a metric cannot be computed; None if it can."""
    if name == "sfid" and not extractor.num_spatial:
        return "the extractor has no spatial features"
    if name == "sfid" and reference.mu_s is None:
        return "the reference has no spatial moments (mu_s, sigma_s)"
    if name == "is" and not extractor.num_classes:
        return "the extractor has no class logits"
    if name not in FEWEST:
        return None
    if reference.features is None:
        return "the reference has neither images nor feature rows"
    rows = min(n, len(reference.features))
    return f"{rows} images; it needs {FEWEST[name]:,} on either side" if rows < FEWEST[name] else None


def _check_counts(name: str, columns: int, reference: ReferenceStatistics, n: int, min_samples: int | None) -> None:
    """ValueError where FID or sFID would rest on fewer images than asked for."""
    needed = columns + 1 if min_samples is None else min_samples
    for count, what in ((n, "samples"), (reference.n, "reference images")):
        if count is not None and count < needed:
            raise ValueError(
                f"{count:,} {what} are too few for {name}: its covariance of {columns:,} features needs {needed:,} "
                "(50,000 are usual for ImageNet). Draw more, name other --metrics, or set --min-samples "
                f"{max(2, min(n, reference.n or n))}: such a distance is biased upwards and compares only at equal "
                "numbers."
            )
