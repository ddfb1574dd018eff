"""All metrics of a set of samples: a table of what each looks at, and which of them are possible.

Shapes: n samples, D pooled features, S spatial features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flashar_pl.metrics.distribution import (
    ADM_SPLIT_SIZE,
    f1_score,
    frechet_distance_from_moments,
    inception_score,
    kernel_distance,
    precision_recall,
)
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.metrics.reference import Moments, ReferenceStatistics


@dataclass(frozen=True)
class Measure:
    """Metrics that are computed together."""

    names: tuple[str, ...]
    of: Literal["pool", "spatial", "logits"]
    """The features they look at."""
    against: Literal["moments", "rows", "nothing"]
    """The part of the reference they are compared with."""
    function: Callable[[Tensor, ReferenceStatistics], tuple[float, ...]]
    """From rows of samples and the reference, one value for each name."""
    rows: int = 1
    """Fewest samples, and reference rows."""


def measures(
    k: int = 3, split_size: int = ADM_SPLIT_SIZE, kid_subsets: int = 100, kid_subset: int = 1000
) -> tuple[Measure, ...]:
    """The table. k: neighbours of precision and recall; split_size: rows per part of the Inception Score."""

    def score(rows: Tensor, real: ReferenceStatistics) -> tuple[float]:
        return (inception_score(rows, split_size=split_size, kind="logits"),)

    def coverage(rows: Tensor, real: ReferenceStatistics) -> tuple[float, float, float]:
        precision, recall = precision_recall(rows, real.features, k)  # type: ignore[arg-type]
        return precision, recall, f1_score(precision, recall)

    def kernel(rows: Tensor, real: ReferenceStatistics) -> tuple[float]:
        return (kernel_distance(rows, real.features, kid_subsets, kid_subset),)  # type: ignore[arg-type]

    return (
        Measure(("fid",), "pool", "moments", lambda rows, real: _frechet(rows, real.mu, real.sigma, real.n)),
        Measure(("sfid",), "spatial", "moments", lambda rows, real: _frechet(rows, real.mu_s, real.sigma_s, real.n)),
        Measure(("is",), "logits", "nothing", score),
        Measure(("precision", "recall", "f1"), "pool", "rows", coverage, rows=k + 1),
        Measure(("kid",), "pool", "rows", kernel, rows=kid_subset),
    )


def _frechet(rows: Tensor, mu: Any, sigma: Any, n: int | None) -> tuple[float]:
    mean, covariance, count = Moments.of(rows).statistics()
    few = count if n is None else min(count, n)
    if few <= rows.shape[1]:
        warnings.warn(
            f"{few} rows for {rows.shape[1]} features: the covariance is singular and the distance biased upwards; "
            "compare only results of equal sample counts",
            stacklevel=3,
        )
    return (frechet_distance_from_moments(mean, covariance, mu, sigma),)


MEASURES = measures()
NAMES = tuple(name for measure in MEASURES for name in measure.names)


def measure(names: Sequence[str], samples: Features, reference: ReferenceStatistics) -> dict[str, float]:
    """Metrics of n samples, whose feature rows are in the order of their numbers. `choose_metrics` says which can be.

    Raises:
        ValueError: too few samples, or reference rows, for a metric.
    """
    results: dict[str, float] = {}
    for each in MEASURES:
        if set(each.names) & set(names):
            rows = getattr(samples, each.of)
            assert rows is not None, f"no {each.of} features for {each.names}"
            results |= dict(zip(each.names, each.function(rows, reference)))
    return {name: results[name] + 0.0 for name in NAMES if name in names}  # -0.0 + 0.0 is 0.0


# --- what is possible ------------------------------------------------------------------------------------------------


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
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown or (names is not None and not names):
        raise ValueError(f"metrics: unknown {', '.join(unknown) or 'empty list'}; expected of {', '.join(NAMES)}.")
    wanted = [name for name in NAMES if names is None or name in names]
    left_out: dict[str, str] = {}
    for measure in MEASURES:
        asked = [name for name in measure.names if name in wanted]
        problem = _problem(measure, extractor, reference, n)
        if asked and problem:
            left_out |= dict.fromkeys(asked, problem)
        elif asked and measure.against == "moments":
            columns = extractor.num_features if measure.of == "pool" else extractor.num_spatial
            _check_counts(measure.names[0], int(columns or 0), reference, n, min_samples)
    if names is not None and left_out:
        listed = "; ".join(f"{name}: {problem}" for name, problem in left_out.items())
        raise ValueError(f"not possible: {listed}. Leave out of --metrics what is not possible.")
    return [name for name in wanted if name not in left_out], left_out


def _problem(measure: Measure, extractor: FeatureExtractor, reference: ReferenceStatistics, n: int) -> str | None:
    """Why metrics cannot be computed; None if they can."""
    if measure.of == "spatial" and not extractor.num_spatial:
        return "the extractor has no spatial features"
    if measure.of == "spatial" and reference.mu_s is None:
        return "the reference has no spatial moments (mu_s, sigma_s)"
    if measure.of == "logits" and not extractor.num_classes:
        return "the extractor has no class logits"
    if measure.against != "rows":
        return None
    if reference.features is None:
        return "the reference has neither images nor feature rows"
    rows = min(n, len(reference.features))
    return f"{rows} images; it needs {measure.rows:,} on either side" if rows < measure.rows else None


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
