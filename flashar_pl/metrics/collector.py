"""All metrics of a set of samples from one pass over their features: a table of what each one looks at.

Shapes: B rows of a batch, n samples over all ranks, D pooled features, S spatial features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from flashar_pl.metrics.distribution import (
    ADM_SPLIT_SIZE,
    f1_score,
    inception_score,
    kernel_distance,
    precision_recall,
)
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.metrics.fid import FrechetDistance
from flashar_pl.metrics.reference import ReferenceStatistics


@dataclass(frozen=True)
class Measure:
    """Metrics that are computed together."""

    names: tuple[str, ...]
    of: Literal["pool", "spatial", "logits"]
    """The features they look at."""
    function: Callable[[Tensor, Tensor], tuple[float, ...]] | None = None
    """From rows of samples and of the reference, one value for each name; None = the Fréchet distance of moments."""
    rows: int = 1
    """Fewest samples, and reference rows where it `compares`."""
    compares: bool = True
    """False: the reference is not looked at."""


def measures(
    k: int = 3, split_size: int = ADM_SPLIT_SIZE, kid_subsets: int = 100, kid_subset: int = 1000
) -> tuple[Measure, ...]:
    """The table. k: neighbours of precision and recall; split_size: rows per part of the Inception Score."""

    def score(samples: Tensor, reference: Tensor) -> tuple[float]:
        return (inception_score(samples, split_size=split_size, kind="logits"),)

    def coverage(samples: Tensor, reference: Tensor) -> tuple[float, float, float]:
        precision, recall = precision_recall(samples, reference, k)
        return precision, recall, f1_score(precision, recall)

    def kernel(samples: Tensor, reference: Tensor) -> tuple[float]:
        return (kernel_distance(samples, reference, kid_subsets, kid_subset),)

    return (
        Measure(("fid",), "pool"),
        Measure(("sfid",), "spatial"),
        Measure(("is",), "logits", score, compares=False),
        Measure(("precision", "recall", "f1"), "pool", coverage, rows=k + 1),
        Measure(("kid",), "pool", kernel, rows=kid_subset),
    )


MEASURES = measures()
NAMES = tuple(name for measure in MEASURES for name in measure.names)


class SampleRows(Metric):
    """Rows kept with their global sample index; after compute() equal and in the same order on every rank."""

    full_state_update = False
    index: list[Tensor] | Tensor
    rows: list[Tensor] | Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, **kwargs)
        self.columns = columns
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor, index: Tensor) -> None:
        """Add rows (B, columns) and their indices (B,) int64."""
        assert isinstance(self.index, list)
        assert isinstance(self.rows, list)
        self.index.append(index.to(self.device, torch.int64))
        self.rows.append(rows.detach().float().to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A rank without samples takes part with tensors of the other ranks' dtype and number of dimensions."""
        if isinstance(self.rows, list) and not self.rows:
            self.update(torch.zeros(0, self.columns), torch.zeros(0, dtype=torch.int64))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Rows (n, columns) in ascending index. Raises ValueError where there are none, or an index occurs twice."""
        if isinstance(self.rows, list) and not self.rows:
            raise ValueError("no samples were added; expected update(...) before compute().")
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        ordered, order = index.sort()
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("a sample index occurs twice; count every sample once, mark padding as not valid.")
        return rows[order]


class DistributionMetrics(nn.Module):
    """FID, sFID, Inception Score, precision, recall, F1 and KID of generated images from one pass.

    FID and sFID keep moments only. The others keep rows in float32 (2048 + 1008 columns: 12 KB per sample), ordered by
    sample index, so that the result does not depend on the number of ranks.

    Args:
        extractor: what makes the features; asked for their numbers only.
        names: which of `NAMES` to compute; see `choose_metrics` for those that are possible.
        sync: compute() joins what all ranks were given; False = one rank has everything.

    Use: set_reference(...), update(features, index) per batch, compute() -> dict of floats, reset().
    """

    def __init__(self, extractor: nn.Module, names: Sequence[str], sync: bool = True) -> None:
        super().__init__()
        columns: dict[str, Any] = {"pool": extractor.num_features}
        if isinstance(extractor, FeatureExtractor):
            columns |= {"spatial": extractor.num_spatial, "logits": extractor.num_classes}
        self.names = [name for name in NAMES if name in names]
        self.measures = [measure for measure in MEASURES if set(measure.names) & set(names)]
        self.moments, self.rows = nn.ModuleDict(), nn.ModuleDict()
        for measure in self.measures:
            name = measure.of
            assert columns.get(name), f"{type(extractor).__name__} has no features for {measure.names}"
            if measure.function is None:
                self.moments[name] = FrechetDistance(columns[name], sync_on_compute=sync)
            elif name not in self.rows:
                self.rows[name] = SampleRows(columns[name], sync_on_compute=sync)
        self._reference: ReferenceStatistics | None = None

    @property
    def fid(self) -> FrechetDistance:
        """The distance of pooled features, which also counts real rows that are given to it."""
        distance = self.moments["pool"]
        assert isinstance(distance, FrechetDistance)
        return distance

    @property
    def device(self) -> torch.device:
        """Where the sums and rows are."""
        metric = next(iter((*self.moments.values(), *self.rows.values())))
        assert isinstance(metric, Metric)
        return metric.device

    def set_reference(self, reference: ReferenceStatistics) -> None:
        """Compare with these real images. ValueError for moments of other features."""
        moments = {"pool": (reference.mu, reference.sigma), "spatial": (reference.mu_s, reference.sigma_s)}
        for name, distance in self.moments.items():
            distance.set_reference(*moments[name], reference.n)  # type: ignore[operator]
        self._reference = reference

    def update(self, features: Features, index: Tensor, valid: Tensor | None = None) -> None:
        """Add features of B generated images.

        Args:
            index: (B,) global sample numbers, each once over all ranks.
            valid: (B,) bool, False for rows that only pad; None counts all.
        """
        keep = torch.ones(len(index), dtype=torch.bool) if valid is None else valid.cpu()
        assert len(features.pool) == len(index) == len(keep)
        for name, distance in self.moments.items():
            rows = getattr(features, name)
            distance.update(rows[keep.to(rows.device)], real=False)  # type: ignore[operator]
        for name, store in self.rows.items():
            rows = getattr(features, name)
            store.update(rows[keep.to(rows.device)], index.cpu()[keep])  # type: ignore[operator]

    def compute(self) -> dict[str, float]:
        """Results by name, equal on all ranks; every rank must call it.

        Raises:
            ValueError: too few samples for a metric, or an index that occurs twice.
        """
        results: dict[str, float] = {}
        kept = None if self._reference is None else self._reference.features
        reference = torch.empty(0) if kept is None else torch.from_numpy(kept)
        rows = {name: store.compute() for name, store in self.rows.items()}  # type: ignore[operator]
        for measure in self.measures:
            if measure.function is None:
                values: tuple[float, ...] = (float(self.moments[measure.of].compute()),)  # type: ignore[operator]
            else:
                values = measure.function(rows[measure.of], reference)
            results |= dict(zip(measure.names, values))
        return {name: results[name] + 0.0 for name in self.names}  # -0.0 + 0.0 is 0.0

    def reset(self) -> None:
        """Forget the samples; the reference stays."""
        for metric in (*self.moments.values(), *self.rows.values()):
            metric.reset()  # type: ignore[operator]


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
        elif asked and measure.function is None:
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
    if measure.function is None or not measure.compares:
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
