"""The planner against a real GPU: peak memory of decoding and of a training step, and the GEMM walk as a graph."""

import pytest
import torch

from flashar_pl.benchmarking.measure import GemmWalk
from flashar_pl.benchmarking.rows import synthetic_condition, synthetic_model
from flashar_pl.commands.benchmark_train import Steps, _model
from flashar_pl.decoding import generate
from flashar_pl.devices import peak_memory
from flashar_pl.planner import decode_job, decode_memory, model_sizes
from flashar_pl.planner.training import CONTEXT_BYTES, TrainingSetup, training_memory

pytestmark = pytest.mark.gpu
SIZES = {"backbone": {"preset": "llamagen-b"}}


def test_peak_of_decoding_is_within_the_plan():
    """Guards the refusal of batches: a peak above the plan runs out of memory, one far below wastes it."""
    device, sizes = torch.device("cuda"), model_sizes(SIZES)
    model = synthetic_model(sizes, device, torch.bfloat16)
    condition, _ = synthetic_condition(sizes, 64, True)
    with peak_memory(device) as peak:
        generate(model, condition, (16, 16), "diagonal", cfg_scale=2.0, seeds=0)
    planned = decode_memory(sizes, "diagonal", (16, 16), 64, True, torch.bfloat16).total
    assert 0.7 * planned < peak.bytes < 1.05 * planned


def test_peak_of_a_training_step_is_within_ten_percent():
    model = _model("llamagen-b", None, torch.device("cuda"))
    steps = Steps(model, 64, (16, 16), True, torch.device("cuda"))
    steps.freeze(2)
    steps.step("chunked")
    with peak_memory(torch.device("cuda")) as peak:
        steps.step("chunked")
    setup = TrainingSetup(grid=(16, 16), gpus=1, samples=64, sharded=False, checkpointing=False)
    planned = training_memory(model_sizes(SIZES), setup).total - CONTEXT_BYTES
    assert peak.bytes == pytest.approx(planned, rel=0.1)


def test_the_gemm_walk_runs_as_a_graph():
    device, sizes = torch.device("cuda"), model_sizes(SIZES)
    model = synthetic_model(sizes, device, torch.bfloat16)
    timing = GemmWalk(model, decode_job(sizes, "diagonal", (16, 16))).measure(samples=2)
    assert 0 < min(timing.wall) < 1
