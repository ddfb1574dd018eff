"""What test_metrics_fid.py asks of two ranks: shared metrics against those of one process."""

from unittest.mock import patch

import torch
import torch.distributed as dist

from flashar_pl.metrics import collector
from flashar_pl.metrics.collector import NAMES, DistributionMetrics
from flashar_pl.metrics.extractor import FeatureExtractor, Features, extract_features
from flashar_pl.metrics.fid import FrechetDistance
from flashar_pl.metrics.reference import reference_from_batches


class Pixels(FeatureExtractor):
    """Pool, spatial and logit features read off the pixels."""

    num_features, num_spatial, num_classes = 6, 4, 3

    def extract(self, images: torch.Tensor) -> Features:
        x = images.float().flatten(2) / 64  # (B, 3, 16)
        return Features(torch.cat([x.mean(2), x.std(2)], dim=1), x[:, 0, :4], x.amax(2) - x.amin(2))


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def measured(rank: int = 0, world: int = 1) -> list[dict[str, float]]:
    """Metrics of 37 samples, metrics of 30, and a distance asked for twice, with this rank's part of the samples."""
    extractor, samples, real = Pixels(), images(37, 1), images(41, 2)
    few = collector.measures(k=2, split_size=10, kid_subsets=4, kid_subset=20)
    with patch.object(collector, "MEASURES", few):
        metrics = DistributionMetrics(extractor, NAMES)
        metrics.set_reference(reference_from_batches(extractor, real.split(9)))
        found = []
        last_rank_only = torch.arange(30 if rank == world - 1 else 0)
        for index in (torch.arange(rank, 37, world), last_rank_only):  # 19 and 18 samples, interleaved; 0 and 30
            for part in index.split(8):
                metrics.update(extract_features(extractor, samples[part]), part)
            found.append(metrics.compute())
            metrics.reset()
    rows, drawn = extractor(real), extractor(samples)
    distance = FrechetDistance(6)
    if rank == 0:
        distance.update(rows, real=True)  # rank 1 has no real rows
    for part in (drawn if world == 1 else drawn[:23] if rank == 0 else drawn[23:]).split(5):
        distance.update(part, real=False)
    once = float(distance.compute())
    distance.update(drawn[:0], real=False)  # summing twice must not double the counts
    return [*found, {"once": once, "again": float(distance.compute())}]


def measured_by_rank() -> list[dict[str, float]]:
    return measured(dist.get_rank(), dist.get_world_size())
