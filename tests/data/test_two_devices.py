"""Two real processes: the data is cut once, and a checkpoint continues on another number of devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import Pair
from toy_shards import write_classes
from two_devices import fit


@pytest.mark.slow
def test_two_devices_then_one_then_two(pair: Pair, tmp_path: Path) -> None:
    """8 batches an epoch, stopped at 5 and 11 of 14; validation shows each sample once over both devices."""
    shards = write_classes(tmp_path / "toy").root
    whole = fit(shards, tmp_path, 1, 14)
    first = pair(fit, shards, tmp_path, 2, 5)
    second = fit(shards, tmp_path, 1, 11, tmp_path / "step-5.ckpt")
    third = pair(fit, shards, tmp_path, 2, 14, tmp_path / "step-11.ckpt")
    both = [[a + b for a, b in zip(*(r["seen"] for r in part), strict=True)] for part in (first, third)]
    assert both[0] + second["seen"] + both[1] == whole["seen"]
    assert sorted(first[0]["validated"] + first[1]["validated"]) == list(range(23))
