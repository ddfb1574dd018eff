"""The short form of `make reliability-kills`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_like_others(tmp_path: Path) -> None:
    """In a process of its own: it forks, and must not have trained before."""
    out, script = tmp_path / "kills.json", Path(__file__).with_name("kills.py")
    options = ("--single", "4", "--ddp", "2", "--fsdp", "1", "--background", "1", "--out", str(out))
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=900)
    counts = json.loads(out.read_text(encoding="utf-8"))
    kinds = ("single", "ddp", "fsdp", "background")
    assert done.returncode == 0, json.dumps([counts[kind]["failures"] for kind in kinds], indent=1)
    assert [counts[kind]["trials"] for kind in kinds] == [4, 2, 1, 1]
