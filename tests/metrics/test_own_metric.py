"""A metric of one's own: one entry of the table, and every reader of the table knows it."""

import math

import pytest
import torch

from flashar_pl.metrics import table
from flashar_pl.metrics.extractor import Features
from flashar_pl.metrics.reference import Moments, ReferenceStatistics


class Extractor:
    """What `choose_metrics` asks of a feature extractor."""

    num_features, num_spatial, num_classes = 3, None, None


def test_a_metric_is_one_entry(monkeypatch) -> None:
    """Guards the table: names, choice, order and values that are not finite come from it, not from a second list."""

    def shift(seen, real, cover):
        return float((seen.pool.double().mean(0) - torch.from_numpy(real.mu)).norm())

    monkeypatch.setitem(table.METRICS, "shift", shift)
    rows = torch.randn(40, 3, dtype=torch.float64)
    mu, sigma, n = Moments.of(rows).statistics()
    reference = ReferenceStatistics(mu.numpy(), sigma.numpy(), n)
    chosen, left_out = table.choose_metrics(None, Extractor(), reference, 40, None)
    assert chosen == ["fid", "shift"]
    assert "is" in left_out
    moved = Features(rows + torch.tensor([0.0, 3.0, 4.0]))
    found, missing = table.measure(chosen, moved, reference)
    assert found["shift"] == pytest.approx(5)
    assert list(found) == ["fid", "shift"]
    assert not missing
    found, missing = table.measure(["shift"], Features(rows * math.inf), reference)
    assert not found
    assert "shift" in missing
    with pytest.raises(ValueError, match=r"expected of fid, .*kid, shift"):
        table.choose_metrics(["drift"], Extractor(), reference, 40, None)
