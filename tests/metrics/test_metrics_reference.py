"""Reference statistics on disk, and all metrics from one pass."""

import numpy as np
import pytest
import torch

from flashar_pl.metrics import table
from flashar_pl.metrics.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from flashar_pl.metrics.extractor import FeatureExtractor, Features, extract_features
from flashar_pl.metrics.reference import Moments, load_reference, reference_from_batches


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


def test_adm_file_with_moments_and_images(tmp_path):
    """Moments in the file win over its images, which then give the rows for precision, recall and KID."""
    real = images(30, 0)
    stored = {"mu": np.arange(6.0), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    pixels = real.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pixels, labels=np.arange(30), **stored)
    statistics = load_reference(tmp_path / "adm.npz", Pixels())
    np.testing.assert_array_equal(statistics.mu, stored["mu"])
    np.testing.assert_array_equal(statistics.sigma_s, stored["sigma_s"])
    np.testing.assert_array_equal(statistics.features, Pixels()(real))
    assert statistics.n is None
    assert load_reference(tmp_path / "adm.npz").features is None
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    fresh = load_reference(tmp_path / "images.npz", Pixels())
    np.testing.assert_allclose(fresh.mu, reference_from_batches(Pixels(), real.split(16)).mu, rtol=1e-12)


def test_save_and_load_give_the_same(tmp_path):
    statistics = reference_from_batches(Pixels(), images(30, 0).split(16))
    statistics.save(tmp_path / "deep" / "reference.npz")
    loaded = load_reference(tmp_path / "deep" / "reference.npz", Pixels())
    for name, value in vars(statistics).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["reference.npz"]


def test_unreadable_references_say_why(tmp_path):
    def stored(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "case.npz", **arrays)
        return str(tmp_path / "case.npz")

    with pytest.raises(ValueError, match="no file"):
        load_reference(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="holds no moments; expected mu and sigma"):
        load_reference(stored(x=np.zeros(2)), Pixels())
    with pytest.raises(ValueError, match="expected uint8 images"):
        load_reference(stored(arr_0=np.zeros((4, 4, 4, 3))), Pixels())
    with pytest.raises(ValueError, match="moments of 5 features; expected 6"):
        load_reference(stored(mu=np.zeros(5), sigma=np.eye(5)), Pixels())
    with pytest.raises(ValueError, match="can be read"):
        load_reference(stored(mu=np.array([{}] * 6), sigma=np.eye(6)))
    good = {"mu": np.zeros(2), "sigma": np.eye(2)}
    for wrong, message in (
        ({"mu": np.array(["a", "b"])}, "mu of .*case.npz holds <U1; expected numbers"),
        ({"n": np.array([3, 4])}, "n of .*case.npz is .3 4.; expected the number"),
        ({"n": np.array(np.nan)}, "n of .* is nan"),
        ({"features": np.zeros((4, 3))}, r"features of .*case.npz are \(4, 3\); expected finite rows of 2"),
        ({"features": np.full((4, 2), np.inf)}, "expected finite rows of 2"),
        ({"sigma": np.full((2, 2), np.nan)}, "case.npz moments hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(stored(**good | wrong))
    with pytest.raises(ValueError, match="too few"):
        reference_from_batches(Pixels(), images(1, 0).split(16))


def test_the_table_equals_the_pure_functions(monkeypatch):
    monkeypatch.setitem(table.FEWEST, "kid", 30)
    real, samples = images(60, 1), images(50, 2)
    reference = reference_from_batches(Pixels(), real.split(16))
    a, b = extract_features(Pixels(), samples), extract_features(Pixels(), real)
    precision, recall = precision_recall(a.pool, b.pool)
    expected = {
        "fid": frechet_distance(a.pool.double(), b.pool.double()),
        "sfid": frechet_distance(a.spatial.double(), b.spatial.double()),
        "is": inception_score(a.logits),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "kid": kernel_distance(a.pool, b.pool, subset_size=30),
    }
    found, missing = table.measure(list(table.METRICS), a, reference)
    assert found == pytest.approx(expected, rel=1e-9)
    assert missing == {}
    assert list(table.measure(["recall", "is"], a, reference)[0]) == ["is", "recall"]
    assert str(table.measure(["fid"], b, reference)[0]) == "{'fid': 0.0}"


def test_moments_of_batches_add_up():
    rows = torch.randn(40, 6, dtype=torch.float64) * 2 + 100
    moments = Moments(6)
    for part in (rows[:7], rows[:0], rows[7:8], rows[8:]):
        moments.add(part)
    mean, covariance, count = moments.statistics()
    assert count == 40
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, rows.T.cov(), rtol=1e-8)
    with pytest.raises(ValueError, match="0 images are too few"):
        Moments(6).statistics()
    with pytest.raises(ValueError, match="NaN or infinity"):
        Moments.of(rows / 0)


def test_singular_covariances_are_warned_about():
    few = extract_features(Pixels(), images(5, 2))
    with pytest.warns(UserWarning, match="5 rows for 6 features"):
        table.measure(["fid"], few, reference_from_batches(Pixels(), [images(40, 1)]))
