"""Two gloo ranks against one process; run by test_metrics_fid.py. Argument: the store file."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def fill(metrics: DistributionMetrics, samples: torch.Tensor, index: torch.Tensor, batch: int) -> dict[str, float]:
    for part in index.split(batch):
        metrics.update(extract_features(Pixels(), samples[part]), part)
    return metrics.compute()


def main(rank: int, store: str) -> None:
    extractor, samples, real = Pixels(), images(37, 1), images(41, 2)
    collector.MEASURES = collector.measures(k=2, split_size=10, kid_subsets=4, kid_subset=20)

    alone = DistributionMetrics(extractor, NAMES)
    alone.set_reference(reference_from_batches(extractor, real.split(9)))
    expected = fill(alone, samples, torch.arange(37), 8)
    rows, drawn = extractor(real), extractor(samples)
    plain = FrechetDistance(6)
    plain.update(rows, real=True)
    plain.update(drawn, real=False)
    distance = float(plain.compute())

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared = DistributionMetrics(extractor, NAMES)
    shared.set_reference(reference_from_batches(extractor, real.split(9)))
    results = fill(shared, samples, torch.arange(rank, 37, 2), 8)  # 19 and 18 samples, interleaved
    assert set(results) == {"fid", "sfid", "is", "precision", "recall", "f1", "kid"}, results
    for name, value in expected.items():
        assert abs(results[name] - value) <= 1e-9 * abs(value), (name, results[name], value)
    shared.reset()
    alone.reset()
    results = fill(shared, samples, torch.arange(30 if rank else 0), 8)  # rank 0 has no sample at all
    dist.barrier()

    split = FrechetDistance(6)
    if rank == 0:
        split.update(rows, real=True)  # rank 1 has no real rows
    for part in drawn[:23].split(5) if rank == 0 else drawn[23:].split(5):
        split.update(part, real=False)
    for _ in range(2):
        assert abs(float(split.compute()) - distance) < 1e-9 * distance
        split.update(drawn[:0], real=False)  # summing twice must not double the counts
    dist.destroy_process_group()

    again = fill(alone, samples, torch.arange(30), 8)
    assert all(abs(results[name] - value) <= 1e-9 * abs(value) for name, value in again.items()), (results, again)
    print("all equal", flush=True)


if __name__ == "__main__":
    mp.start_processes(main, args=(sys.argv[1],), nprocs=2, start_method="fork")  # torch is imported once
