"""Reference statistics on disk, and all metrics from one pass."""

import numpy as np
import pytest
import torch

from flashar_pl.metrics.collector import DistributionMetrics
from flashar_pl.metrics.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from flashar_pl.metrics.extractor import FeatureExtractor, Features, extract_features
from flashar_pl.metrics.reference import (
    ReferenceStatistics,
    cached_reference,
    file_digest,
    load_reference,
    reference_from_batches,
    reference_from_images,
)


class Pixels(FeatureExtractor):
    """Pool, spatial and logit features read off the pixels."""

    num_features, num_spatial, num_classes = 6, 4, 3

    def extract(self, images: torch.Tensor) -> Features:
        x = images.float().flatten(2) / 64  # (B, 3, 16)
        return Features(torch.cat([x.mean(2), x.std(2)], dim=1), x[:, 0, :4], x.amax(2) - x.amin(2))

    def fingerprint(self) -> str:
        return "pixels"


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_moments_from_batches_equal_numpy():
    real = images(41, 0)
    statistics = reference_from_batches(Pixels(), real.split(7), keep_features=15)
    features = Pixels().extract(real)
    assert statistics.n == 41
    np.testing.assert_allclose(statistics.mu, features.pool.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(features.pool.double(), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(statistics.sigma_s, np.cov(features.spatial.double(), rowvar=False), rtol=1e-9)
    np.testing.assert_array_equal(statistics.features, features.pool[:15])
    assert reference_from_images(Pixels(), real, batch_size=64).digest == statistics.digest
    assert reference_from_images(Pixels(), images(41, 1)).digest != statistics.digest


def test_adm_file_with_moments_and_images(tmp_path):
    """Moments in the file win over its images, which then give the rows for precision, recall and KID."""
    real = images(30, 0)
    stored = {"mu": np.arange(6.0), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    pixels = real.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pixels, labels=np.arange(30), **stored)
    statistics = load_reference(tmp_path / "adm.npz", Pixels(), batch_size=8)
    np.testing.assert_array_equal(statistics.mu, stored["mu"])
    np.testing.assert_array_equal(statistics.sigma_s, stored["sigma_s"])
    np.testing.assert_array_equal(statistics.features, Pixels()(real))
    assert statistics.n is None
    assert statistics.digest == file_digest(tmp_path / "adm.npz")
    assert load_reference(tmp_path / "adm.npz").features is None
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    fresh = load_reference(tmp_path / "images.npz", Pixels())
    np.testing.assert_array_equal(fresh.mu, reference_from_images(Pixels(), real).mu)


def test_save_and_load_give_the_same(tmp_path):
    statistics = reference_from_images(Pixels(), images(30, 0))
    statistics.save(tmp_path / "deep" / "reference.npz")
    loaded = load_reference(tmp_path / "deep" / "reference.npz", Pixels())
    for name, value in vars(statistics).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["reference.npz"]


def test_cache_is_used_and_follows_images_and_weights(tmp_path):
    calls = []

    def build() -> ReferenceStatistics:
        calls.append(1)
        return reference_from_images(Pixels(), images(30, len(calls)))

    first = cached_reference(tmp_path, {"split": "test"}, Pixels(), build)
    again = cached_reference(tmp_path, {"split": "test"}, Pixels(), build)
    assert (len(calls), again.digest) == (1, first.digest)
    cached_reference(tmp_path, {"split": "train"}, Pixels(), build)
    other = Pixels()
    other.fingerprint = lambda: "other weights"
    cached_reference(tmp_path, {"split": "test"}, other, build)
    assert len(calls) == 3


def test_unreadable_references_say_why(tmp_path):
    def stored(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "case.npz", **arrays)
        return str(tmp_path / "case.npz")

    with pytest.raises(ValueError, match="no reference statistics at"):
        load_reference(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match="not a readable"):
        load_reference(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="neither mu nor arr_0"):
        load_reference(stored(x=np.zeros(2)), Pixels())
    with pytest.raises(ValueError, match="give a feature extractor"):
        load_reference(stored(arr_0=np.zeros((4, 4, 4, 3), np.uint8)))
    with pytest.raises(ValueError, match="must be uint8 images"):
        load_reference(stored(arr_0=np.zeros((4, 4, 4, 3))), Pixels())
    with pytest.raises(ValueError, match="moments of 5 features, the extractor gives 6"):
        load_reference(stored(mu=np.zeros(5), sigma=np.eye(5)), Pixels())
    with pytest.raises(ValueError, match="without its covariance"):
        load_reference(stored(mu=np.zeros(6)), Pixels())
    with pytest.raises(ValueError, match="not a readable"):
        load_reference(stored(mu=np.array([{}] * 6), sigma=np.eye(6)))
    with pytest.raises(ValueError, match="too few"):
        reference_from_images(Pixels(), images(1, 0))


def test_one_pass_equals_the_pure_functions():
    real, samples = images(60, 1), images(50, 2)
    metrics = DistributionMetrics(Pixels(), split_size=20, kid_subsets=3, kid_subset_size=30)
    metrics.set_reference(reference_from_images(Pixels(), real))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for part in order.split(8):  # any order of arrival, and padding
        padded = torch.cat([part, part[:1]])
        valid = torch.ones(len(padded), dtype=torch.bool)
        valid[-1] = False
        metrics.update(samples[padded], padded, valid)
    results = metrics.compute()
    a, b = extract_features(Pixels(), samples), extract_features(Pixels(), real)
    precision, recall = precision_recall(a.pool, b.pool)
    expected = {
        "fid": frechet_distance(a.pool.double(), b.pool.double()),
        "sfid": frechet_distance(a.spatial.double(), b.spatial.double()),
        "is": inception_score(a.logits, split_size=20),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "kid": kernel_distance(a.pool, b.pool, 3, 30),
    }
    assert results == pytest.approx(expected, rel=1e-9)
    metrics.reset()
    metrics.update(samples)
    assert metrics.compute() == pytest.approx(expected, rel=1e-9)


def test_collector_leaves_out_what_is_not_possible_and_refuses_what_was_asked_for():
    reference = reference_from_images(Pixels(), images(30, 1), keep_features=0)
    metrics = DistributionMetrics(Pixels())
    with pytest.raises(ValueError, match="call set_reference first"):
        metrics.compute()
    metrics.set_reference(reference)
    metrics.update(images(30, 2))
    assert set(metrics.compute()) == {"fid", "sfid", "is"}
    with pytest.raises(ValueError, match="lacks what these need: kid"):
        DistributionMetrics(Pixels(), names=["fid", "kid"]).set_reference(reference)
    with pytest.raises(ValueError, match="unknown metrics"):
        DistributionMetrics(Pixels(), names=["FID"])
    plain = torch.nn.Flatten()
    plain.num_features = 48
    with pytest.raises(ValueError, match="Flatten has no features for sfid"):
        DistributionMetrics(plain, names=["sfid"])
    metrics.update(images(2, 3), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="occurs twice"):
        metrics.compute()
