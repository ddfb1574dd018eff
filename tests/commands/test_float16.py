"""float16 on a CPU, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest


def test_generate_in_float16(run, flashar_model, tmp_path: Path) -> None:
    """Guards an operation without a float16 kernel on a CPU, in either plan."""
    for plan in ("raster", "diagonal"):
        words = (
            "--classes",
            "3",
            "--num-images",
            2,
            "--cfg-scale",
            2,
            "--plan",
            plan,
            "--dtype",
            "fp16",
            "--codes-only",
        )
        code, _, err = run("generate", "--checkpoint", flashar_model, *words, "--out", tmp_path / plan)
        assert code == 0, err
        codes = np.load(tmp_path / plan / "codes.npy")
        assert codes.shape[1:] == (8, 8)
        assert 0 <= codes.min() <= codes.max() < 17
        assert json.loads((tmp_path / plan / "settings.json").read_text())["settings"]["dtype"] == "fp16"


@pytest.mark.slow
def test_benchmark_in_float16(run, flashar_model, tmp_path: Path) -> None:
    """Guards the device rates, the GEMM-only walk and both plans in float16."""
    words = ("--dtype", "fp16", "--repeats", 1, "--threads", 1, "--skip-plain", "--device", "cpu")
    code, _, err = run("benchmark", "--checkpoint", flashar_model, *words, "--out", tmp_path / "b")
    assert code == 0, err
    rows = json.loads((tmp_path / "b" / "results.json").read_text())["rows"]
    assert [row["plan"] for row in rows] == ["raster", "diagonal"]
    assert all(row["seconds"] > 0 and row["gemm_s"] > 0 for row in rows)
