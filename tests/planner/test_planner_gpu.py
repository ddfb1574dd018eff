"""The planner against a real GPU: peak memory of decoding and of a training step, and the GEMM walk as a graph."""

import pytest
import torch

from flashar_pl.benchmarking.measure import GemmWalk
from flashar_pl.benchmarking.subjects import Subject
from flashar_pl.commands.benchmark_train import StepOptions, make_steps
from flashar_pl.decoding import generate
from flashar_pl.devices import peak_memory
from flashar_pl.options import PresetOptions
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.training import CONTEXT_BYTES, TrainingSetup, training_memory

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.fixture
def subject() -> Subject:
    return Subject.of(PresetOptions("llamagen-b"), DEVICE)


def test_peak_of_decoding_is_within_the_plan(subject):
    """Guards the refusal of batches: a peak above the plan runs out of memory, one far below wastes it."""
    model = subject.model(DEVICE, torch.bfloat16)
    condition, _ = subject.condition(64, True)
    with peak_memory(DEVICE) as peak:
        generate(model, condition, (16, 16), "diagonal", cfg_scale=2.0, seeds=0)
    planned = DecodeJob(subject.sizes, "diagonal", (16, 16), 64, True, torch.bfloat16).memory.total
    assert 0.7 * planned < peak.bytes < 1.05 * planned


def test_peak_of_a_training_step_is_within_ten_percent(subject):
    steps = make_steps(subject, 64, StepOptions(), DEVICE, "bf16")
    steps.freeze(2)
    steps.step("chunked")
    with peak_memory(DEVICE) as peak:
        steps.step("chunked")
    setup = TrainingSetup(grid=(16, 16), gpus=1, samples=64, sharded=False, checkpointing=False)
    planned = training_memory(subject.sizes, setup).total - CONTEXT_BYTES
    assert peak.bytes == pytest.approx(planned, rel=0.1)


def test_the_gemm_walk_runs_as_a_graph(subject):
    model = subject.model(DEVICE, torch.bfloat16)
    timing = GemmWalk(model, DecodeJob(subject.sizes, "diagonal", (16, 16))).measure(samples=2)
    assert 0 < min(timing.wall) < 1
