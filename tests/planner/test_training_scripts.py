"""`benchmarks/attention.py`, tried on a CPU: it must be right before a GPU is rented."""

import importlib.util
import json
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


@pytest.mark.gpu
def test_flex_equals_the_mask_on_a_gpu():
    script = load("attention")
    [shape] = script.TINY
    row = script.measure("flex", shape, torch.device("cuda"), torch.float32, 1)
    assert row["difference"] < 1e-4
    assert "not_run" not in row
