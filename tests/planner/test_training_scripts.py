"""`benchmarks/train_gpu.py` and `attention.py`, tried on a CPU: they must be right before a GPU is rented."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tiny-llamagen", "tiny-emu35"])
def test_a_large_training_step(job, tmp_path):
    """A process of its own, because it makes a process group; the last line is the result."""
    words = [job, "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, BENCHMARKS / "train_gpu.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    first, second = result["rows"]
    for row in (first, second):
        for part, counted in row["counted"].items():
            assert counted == pytest.approx(row["planned"][part], rel=0.01), part
        assert all(share > 0 for share in row["shares"].values())  # times of one repeat: no upper bound holds
        assert set(row["shares"]) == {"attention", "cross_entropy", "optimizer"}
        assert row["flops"] < row["flops_with_recomputation"]
        assert row["peak_bytes"] == max(row["peak_compute_bytes"], row["peak_optimizer_bytes"])
    assert first["counted"]["moments"] < second["counted"]["moments"], "stage 1 makes no moments of frozen weights"


def test_the_jobs_of_the_gpu_script_fit_it():
    """The two sizes that the issue names, on one GPU of 141 GB."""
    script, words = load("train_gpu"), (BENCHMARKS / "train_gpu.sh").read_text()
    for name in re.search(r'JOBS="([^"]*)"', words)[1].split():
        job = script.JOBS[name]
        planned = max(script.training_memory(job.sizes, job.setup, stage).total for stage in (1, 2))
        assert 40e9 < planned < 0.94 * 141e9, name
        parts = job.sizes.parameters()
        assert 3e9 < parts["backbone"] + parts["horizontal_head"] < 7.6e9


def test_forms_of_attention(capsys):
    """Every form but the bound computes the same; on a CPU flex has no backward pass, and says so."""
    script = load("attention")
    forms = "mask,bias,causal"
    result = script.main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--repeats", "1", "--forms", forms])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    rows = {row["form"]: row for row in result["rows"]}
    assert list(rows) == forms.split(",")
    assert rows["bias"]["difference"] < 1e-5
    assert all(row["both"]["seconds"] > 0 and row["forward"]["repeats"] == 1 for row in rows.values())


def test_the_form_mask_is_what_the_package_runs(monkeypatch):
    """Guards the comparison: grouped heads with a mask fall back to slow kernels unless they are rows of one head."""
    script, seen = load("attention"), []
    [shape] = script.TINY
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, *arguments, **options):
        seen.append((q.shape[1], options.get("enable_gqa", False)))
        return real(q, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = script.inputs(shape, torch.device("cpu"), torch.float32)
    script.function("mask", shape, torch.device("cpu"), torch.float32)(q, k, v)
    assert seen == [(shape.kv_heads, False)]


def test_the_mask_of_flex_is_the_mask_of_the_plan():
    script = load("attention")
    [shape] = script.TINY
    turn = script.turns(shape, torch.device("cpu"))
    torch.testing.assert_close(turn[:, None] >= turn, shape.plan.mask(shape.prefix))


@pytest.mark.gpu
def test_flex_equals_the_mask_on_a_gpu():
    script = load("attention")
    [shape] = script.TINY
    row = script.measure("flex", shape, torch.device("cuda"), torch.float32, 1)
    assert row["difference"] < 1e-4
    assert "not_run" not in row
