"""All distribution metrics from one pass over the samples.

Shape legend: B batch, n samples over all ranks, D pooled features, S spatial features, C classes.
"""

from collections.abc import Sequence
from typing import Any

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
from flashar_pl.metrics.extractor import FeatureExtractor, Features, extract_features
from flashar_pl.metrics.fid import FrechetDistance
from flashar_pl.metrics.reference import ReferenceStatistics

NAMES = ("fid", "sfid", "is", "precision", "recall", "f1", "kid")
_NEED_ROWS = {"precision", "recall", "f1", "kid"}


class SampleRows(Metric):
    """Rows kept with their global sample index; after compute() equal and in the same order on every rank."""

    full_state_update = False
    index: list[Tensor] | Tensor
    rows: list[Tensor] | Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = columns
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor, index: Tensor) -> None:
        """Add rows (B, columns) and their indices (B,) int64."""
        assert isinstance(self.index, list)
        assert isinstance(self.rows, list)
        self.index.append(index.to(self.device, torch.int64))
        self.rows.append(rows.detach().float().to(self.device))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without samples must take part with tensors of the other ranks' dtype and number of dimensions.
        self._fill_empty()
        super()._sync_dist(*args, **kwargs)

    def _fill_empty(self) -> None:
        if isinstance(self.rows, list) and not self.rows:
            self.index = [torch.zeros(0, dtype=torch.int64, device=self.device)]
            self.rows = [torch.zeros(0, self.columns, device=self.device)]

    def compute(self) -> Tensor:
        """Rows (n, columns) in ascending index. ValueError where an index occurs twice."""
        self._fill_empty()
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        ordered, order = index.sort()
        if len(ordered) > 1 and bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("a sample index occurs twice: count every sample once, mark padding as not valid")
        return rows[order]


class DistributionMetrics(nn.Module):
    """FID, sFID, Inception Score, precision, recall, F1 and KID of generated images from one pass.

    FID and sFID keep moments only. The others keep rows in float32 (2048 + 1008 columns: 12 KB per sample), ordered by
    sample index, so that the result does not depend on the number of ranks.

    Args:
        extractor: features of uint8 images; kept outside the module tree (see FrechetDistance).
        names: which of "fid", "sfid", "is", "precision", "recall", "f1", "kid" to compute; None: all that the extractor
            and the reference allow.
        k: neighbours of precision and recall.
        split_size: rows per part of the Inception Score.
        kid_subsets, kid_subset_size: as in `kernel_distance`; with names=None KID is left out where there are fewer
            rows than `kid_subset_size`.
        min_samples: FID and sFID refuse fewer.

    Use: set_reference(...), update(images, index) per batch, compute() -> dict of floats, reset().
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        names: Sequence[str] | None = None,
        k: int = 3,
        split_size: int = ADM_SPLIT_SIZE,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        min_samples: int = 2,
    ) -> None:
        super().__init__()
        unknown = sorted(set(names or ()) - set(NAMES))
        if unknown or (names is not None and not names):
            raise ValueError(f"unknown metrics ({', '.join(unknown)}): choose from {', '.join(NAMES)}")
        spatial = extractor.num_spatial if isinstance(extractor, FeatureExtractor) else None
        classes = extractor.num_classes if isinstance(extractor, FeatureExtractor) else None
        possible = [name for name in NAMES if (name != "sfid" or spatial) and (name != "is" or classes)]
        missing = sorted(set(names or ()) - set(possible))
        if missing:
            raise ValueError(f"{type(extractor).__name__} has no features for {', '.join(missing)}")
        self.strict = names is not None
        self.names = [name for name in possible if names is None or name in names]
        self.k, self.split_size = k, split_size
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self._extractor = (extractor,)
        columns = int(extractor.num_features)  # type: ignore[arg-type]
        wanted = set(self.names)
        self.fid = FrechetDistance(columns, min_samples=min_samples) if "fid" in wanted else None
        self.sfid = FrechetDistance(spatial, min_samples=min_samples) if "sfid" in wanted and spatial else None
        self.pool = SampleRows(columns) if wanted & _NEED_ROWS else None
        self.logits = SampleRows(classes) if "is" in wanted and classes else None
        self._reference: ReferenceStatistics | None = None
        self._next = 0

    def set_reference(self, reference: ReferenceStatistics) -> None:
        """Compare with these real images. ValueError where a metric asked for by name lacks its part of them."""
        if self.strict:
            lacking = set(self.names) & _NEED_ROWS if reference.features is None else set()
            lacking |= {"sfid"} & set(self.names) if reference.mu_s is None else set()
            if lacking:
                raise ValueError(f"the reference lacks what these need: {', '.join(sorted(lacking))}")
        if self.fid is not None:
            self.fid.set_reference(reference.mu, reference.sigma, reference.n)
        if self.sfid is not None and reference.mu_s is not None:
            self.sfid.set_reference(reference.mu_s, reference.sigma_s, reference.n)
        self._reference = reference

    def update(self, images: Tensor, index: Tensor | None = None, valid: Tensor | None = None) -> Features:
        """Add generated uint8 images (B, 3, h, w); see `update_features`. Returns their features."""
        metrics = [metric for metric in (self.fid, self.sfid, self.pool, self.logits) if metric is not None]
        features = extract_features(self._extractor[0].to(metrics[0].device), images)
        self.update_features(features, index, valid)
        return features

    def update_features(self, features: Features, index: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add features of B generated images.

        Args:
            index: (B,) global sample numbers, each once over all ranks; None counts up on this rank, which is only
                right on a single rank.
            valid: (B,) bool, False for rows that only pad; None counts all.
        """
        size = len(features.pool)
        if index is None:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise ValueError("several ranks: give the global sample numbers as index")
            index = torch.arange(self._next, self._next + size)
            self._next += size
        keep = torch.ones(size, dtype=torch.bool) if valid is None else valid.cpu()
        if tuple(index.shape) != (size,) or tuple(keep.shape) != (size,):
            raise ValueError(f"index and valid must have shape ({size},): {tuple(index.shape)}, {tuple(keep.shape)}")
        chosen = index.cpu()[keep]
        pairs: list[tuple[FrechetDistance | None, SampleRows | None, Tensor | None]] = [
            (self.fid, self.pool, features.pool),
            (self.sfid, None, features.spatial),
            (None, self.logits, features.logits),
        ]
        for moments, store, values in pairs:
            if moments is None and store is None:
                continue
            assert values is not None
            rows = values[keep.to(values.device)]
            if moments is not None:
                moments.update_features(rows, real=False)
            if store is not None:
                store.update(rows, chosen)

    def compute(self) -> dict[str, float]:
        """Results by name, equal on all ranks; every rank must call it.

        Raises:
            ValueError: too few samples for a metric asked for, an index that occurs twice, or no reference.
        """
        # FID may count real rows given to `fid` itself; it refuses too few of them, on all ranks alike.
        if self._reference is None and not set(self.names) <= {"fid", "is"}:
            raise ValueError("no reference statistics: call set_reference first")
        results: dict[str, float] = {}
        if self.fid is not None:
            results["fid"] = float(self.fid.compute())
        if self.sfid is not None and self.sfid.has_reference:
            results["sfid"] = float(self.sfid.compute())
        if self.logits is not None:
            results["is"] = inception_score(self.logits.compute(), split_size=self.split_size, kind="logits")
        if self.pool is not None and self._reference is not None and self._reference.features is not None:
            results |= self._row_metrics(self.pool.compute(), torch.from_numpy(self._reference.features))
        return {name: results[name] for name in self.names if name in results}

    def _row_metrics(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        results: dict[str, float] = {}
        smaller = min(len(samples), len(reference))
        if {"precision", "recall", "f1"} & set(self.names) and (self.strict or smaller > self.k):
            precision, recall = precision_recall(samples, reference, self.k)
            results |= {"precision": precision, "recall": recall, "f1": f1_score(precision, recall)}
        if "kid" in self.names and (self.strict or smaller >= self.kid_subset_size):
            results["kid"] = kernel_distance(samples, reference, self.kid_subsets, self.kid_subset_size)
        return results

    def reset(self) -> None:
        """Forget the samples; the reference stays."""
        for metric in (self.fid, self.sfid, self.pool, self.logits):
            if metric is not None:
                metric.reset()
        self._next = 0
