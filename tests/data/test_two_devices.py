"""Two real processes: the data is cut once, and a checkpoint continues on another number of devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_shards import write_classes

SCRIPT = Path(__file__).with_name("two_devices.py")


def run(shards: str, out: Path, devices: int, steps: int, checkpoint: Path | None = None) -> list[dict]:
    out.mkdir()
    command = [sys.executable, str(SCRIPT), shards, str(out), str(devices), str(steps)]
    subprocess.run(command + ([str(checkpoint)] if checkpoint else []), check=True, timeout=120, capture_output=True)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.slow
def test_two_devices_then_one_then_two(tmp_path: Path) -> None:
    """8 batches an epoch, stopped at 5 and 11 of 14; validation shows each sample once over both devices."""
    manifest = write_classes(tmp_path / "toy")
    [whole] = run(manifest.root, tmp_path / "whole", 1, 14)
    first = run(manifest.root, tmp_path / "first", 2, 5)
    [second] = run(manifest.root, tmp_path / "second", 1, 11, tmp_path / "first" / "step-5.ckpt")
    third = run(manifest.root, tmp_path / "third", 2, 14, tmp_path / "second" / "step-11.ckpt")
    both = [[a + b for a, b in zip(*(r["seen"] for r in part), strict=True)] for part in (first, third)]
    assert both[0] + second["seen"] + both[1] == whole["seen"]
    assert sorted(first[0]["validated"] + first[1]["validated"]) == list(range(23))
