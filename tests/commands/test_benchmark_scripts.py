"""The scripts in benchmarks/: the table of targets, and that every prepared command runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def targets():
    spec = importlib.util.spec_from_file_location("targets", SCRIPTS / "targets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["targets"] = module
    spec.loader.exec_module(module)
    return module


def row(plan, batch, ms, runner="graphs", weights="plain", over_gemm=1.2):
    return {
        "plan": plan, "runner": runner, "weight_format": weights, "batch": batch, "ms_per_image": ms,
        "images_per_s": 1e3 / ms, "over_gemm": over_gemm,
    }  # fmt: skip


def write(folder: Path, name: str, rows, threads=None, grid=(16, 16), speedups=(), **command) -> None:
    command = {"preset": "llamagen-l", "dtype": "bf16", "checkpoint": None, "cfg_scale": 2.0, **command}
    content = {"command": command, "threads": threads, "grid": list(grid), "rows": rows, "speedups": list(speedups)}
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(content))


def verdicts(targets, folder: Path) -> dict[str, str]:
    return {line[0]: line[3] for line in [*targets.cpu_lines(folder), *targets.gpu_lines(folder)]}


def test_targets_are_met_by_rows_of_their_own_job_only(targets, tmp_path):
    """Guards against a target called met by a CPU, another grid, another batch, no guidance or rounded weights."""
    fast = [row("diagonal", 1, 1.0), row("raster", 1, 1.0)]
    write(tmp_path, "decode_a", fast, threads=1)
    write(tmp_path, "decode_b", fast, grid=(2, 2))
    write(tmp_path, "decode_c", fast, cfg_scale=1)
    write(tmp_path, "decode_d", fast, dtype="fp32")
    write(tmp_path, "decode_e", [row("diagonal", 1, 1.0, weights="int8")])
    assert set(verdicts(targets, tmp_path).values()) == {"not measured"}
    rows = [row("diagonal", 1, 16.5), row("diagonal", 1, 12.0, "compiled-graphs"), row("raster", 1, 99.0)]
    write(tmp_path, "decode_f", [*rows, row("diagonal", 64, 0.9), row("diagonal", 512, 1.2)])
    found = verdicts(targets, tmp_path)
    assert found["LlamaGen-L, batch 1, diagonal, ms"] == "met, stretch 9 not"
    assert found["LlamaGen-L, batch 1, raster, ms"] == "MISSED by 10%"
    assert found["LlamaGen-L, best batch, diagonal, images/s"] == "met"
    assert found["Emu3.5-34B, 32 x 32, diagonal, ms"] == "not measured"
    table = targets.target_table(tmp_path)
    assert "compiled-graphs, plain, batch 1" in table
    assert len(table.splitlines()) == 2 + 6


def test_cpu_targets(targets, tmp_path):
    rows = [row("raster", 1, 9.0, "eager", over_gemm=1.29), row("diagonal", 1, 3.0, "eager", over_gemm=1.5)]
    speedup = {"plan": "diagonal", "runner": "eager", "weight_format": "plain", "batch": 1, "over_raster": 3.0,
               "gemm_only": 4.0}  # fmt: skip
    write(tmp_path, "decode_cpu", rows, threads=1, speedups=[speedup], preset="llamagen-b")
    write(tmp_path, "decode_many_threads", rows, threads=2, speedups=[speedup], preset="llamagen-b")
    lines = targets.cpu_lines(tmp_path)
    assert [line[3] for line in lines] == ["met", "MISSED by 11%", "MISSED by 12%"]


def run_script(*words: str, script: str = "gpu.sh", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words], env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=SCRIPTS.parent, capture_output=True, text=True,
    )  # fmt: skip


def test_unknown_parts_are_refused():
    done = run_script("latencies", DRY="1")
    assert done.returncode == 2
    assert "part is 'latencies'" in done.stderr


@pytest.mark.slow
def test_every_command_of_the_gpu_script_runs(tmp_path):
    """On a CPU, with LlamaGen-B and four codes. Guards the one run on a GPU against a typing error."""
    done = run_script(DRY="1", DRY_OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("decode_*/results.json"))) == 6
    assert len(list(tmp_path.glob("profile_*.md"))) == 2
    assert "not measured" in done.stdout
    again = run_script("large", DRY="1", DRY_OUT=str(tmp_path))
    assert "is there and kept" in again.stdout


@pytest.mark.slow
def test_every_command_of_the_training_script_runs(tmp_path):
    done = run_script(script="train_gpu.sh", DRY="1", DRY_OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "train_llamagen_b_gpu.json", "train_llamagen_l_gpu.json", "attention_gpu.json",
    }  # fmt: skip
