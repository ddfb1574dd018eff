"""Predicted decoding: kernels counted on the meta device, and milliseconds between the floor and the constants."""

from dataclasses import replace

import pytest
from test_planner_decode import CONFIGS

from flashar_pl.commands.plan import DecodingOptions, HardwareOptions, RunOptions, plan
from flashar_pl.decoding.loop import decode
from flashar_pl.planner.advice import GPUS
from flashar_pl.planner.cost import (
    OPERATORS,
    OWN,
    Prediction,
    _on_meta,
    count,
    kernels_of_kinds,
    kernels_of_steps,
    prediction,
)
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes, named_sizes


def large(plan: str) -> DecodeJob:
    """One guided image of LlamaGen-L: 24 layers and a branch of 1."""
    return DecodeJob(named_sizes("llamagen-l", None, None), plan, (16, 16))


def test_the_budget_of_the_own_kernels():
    """Five a layer and forward; a draw a step, logits a step but the first, a gate where a cell has both heads.

    Guards a sixth kernel of a layer, and a kind of step that has no graph of its own.
    """
    steps, nodes = kernels_of_kinds(large("diagonal"))
    assert sum(each.own for each in steps) == 30 * 25 * 5 + 31 + 30 + 29
    assert nodes == sum(each.total for each in steps), "every diagonal has a kind of its own"
    steps, nodes = kernels_of_kinds(large("raster"))
    assert sum(each.own for each in steps) == 255 * 24 * 5 + 256 + 255
    assert nodes < 1000, "three kinds of steps, and the prefix"


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=["llamagen", "emu35"])
def test_a_raster_plan_repeats_its_rows(config):
    """Counting one row and the first step of the next must give what counting all does, with row ends and masks."""
    job = DecodeJob(model_sizes(config), "raster", (4, 3))
    model, *rest = _on_meta(job)
    steps = decode(model, job.order, *rest)
    assert [count(lambda: next(steps)) for _ in range(12)] == kernels_of_steps(job)


def test_prompts_have_a_mask_at_every_step():
    """Guards an Emu3.5 that is predicted as if its attention were unmasked."""
    job = DecodeJob(model_sizes(CONFIGS[2]), "diagonal", (3, 3))
    assert [each.masked for each in kernels_of_steps(job)] == [job.layers] * 5
    steps, _ = kernels_of_kinds(job)
    assert [each.masked for each in steps] == [job.layers] + [0] * 5


@pytest.mark.parametrize("runner", ["graphs", "fused", "eager"])
def test_predictions_lie_above_the_floor_in_their_order(runner):
    """Guards constants that stand the wrong way round, and a product or cache that is forgotten."""
    for table in (OPERATORS, OWN):
        for name, (low, central, high) in table.items():
            slower = name.endswith(("bandwidth", "rate"))
            assert (low > central > high) if slower else (low < central < high), name
            assert not slower or low <= 1, name
    for plan_name in ("raster", "diagonal"):
        for sizes in (model_sizes(CONFIGS[0]), model_sizes(CONFIGS[2])):
            job = DecodeJob(sizes, plan_name, (3, 3))
            made = Prediction(job, runner, GPUS["h200"])
            for gpu in GPUS.values():
                object.__setattr__(made, "gpu", gpu)  # keeps what was counted
                low, central, high = made.seconds
                assert high > central > low > job.floor(gpu.bandwidth, gpu.flops)


def test_one_forward_by_hand():
    """The raster prefix of LlamaGen-L by its 24 layers on an H200, central: each product at its least time or its
    weights' time, written out."""
    made = Prediction(large("raster"), "graphs", GPUS["h200"])
    at = {name: each[1] for name, each in OPERATORS.items()}
    sizes = [1024 * 3 * 1024, 1024 * 1024, 1024 * 2 * 2816, 2816 * 1024]  # wqkv, wo, w13, w2
    layer = sum(max(3.2e-6, 2 * size / (4.8e12 * 0.72)) for size in sizes)
    head = 2 * 1024 * 16384 / (4.8e12 * 0.72)
    assert made._products(made.job.forwards[5], at) == pytest.approx(24 * layer + head)


@pytest.mark.slow
def test_llamagen_l_on_an_h200():
    """Kernels, and 8 us of the host for each without graphs. Milliseconds are those of another program with the same
    constants, which took every operator at its own bytes: 43 diagonal with graphs, 16 fused, 324 raster with graphs."""
    seconds = {}
    for plan_name, runner in (
        ("diagonal", "graphs"),
        ("diagonal", "fused"),
        ("raster", "graphs"),
        ("diagonal", "eager"),
    ):
        made = Prediction(large(plan_name), runner, GPUS["h200"])
        seconds[plan_name, runner] = made.seconds
        if runner != "fused":
            assert made.kernels == pytest.approx(13_642 if plan_name == "diagonal" else 104_267, rel=0.01)
        assert runner == "fused" or made.nodes == (0 if runner == "eager" else made.kernels)
        if runner == "eager":
            assert made.seconds[1] == pytest.approx(8e-6 * made.kernels)
    assert [1e3 * s for s in seconds["diagonal", "graphs"]] == pytest.approx([32, 43, 59], rel=0.03)
    assert [1e3 * s for s in seconds["raster", "graphs"]] == pytest.approx([241, 324, 447], rel=0.03)
    assert 1e3 * seconds["diagonal", "fused"][1] == pytest.approx(16, rel=0.1)


def test_the_command_prints_predictions_beside_the_floor(capsys):
    result = plan(RunOptions(preset="llamagen-b", grid="4x4"), HardwareOptions(gpu="h200"),
                  DecodingOptions(decode=True, runner="fused"))  # fmt: skip
    for each in result["decode"]:
        low, central, high = each["predicted_s"]
        assert each["floor_s"] < low < central < high
    assert "no GPU has confirmed them" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --decode"):
        DecodingOptions(runner="fused")
    with pytest.raises(ValueError, match="--decode predicts raster and diagonal plans"):
        plan(RunOptions(preset="var-d16"), decoding=DecodingOptions(decode=True))


def test_a_checkpoint_is_planned(tmp_path, capsys):
    """Guards a checkpoint that is planned on the family's usual grid, or as another kind of model."""
    import tiny

    from flashar_pl.checkpoints.description import Description
    from flashar_pl.checkpoints.weights import save_model

    model = tiny.flashar()
    save_model(tmp_path / "model", model, Description(model.config(), grid=(3, 5)))
    result = plan(RunOptions(checkpoint=str(tmp_path / "model")))
    assert result["setup"]["grid"] == (3, 5)
    assert sum(result["parameters"].values()) == sum(each.numel() for each in model.parameters())
    with pytest.raises(ValueError, match="give either"):
        RunOptions(checkpoint="x", preset="llamagen-b")


def test_devices_that_share_a_model_hold_parts_and_meet():
    """Guards a device that is counted with the whole cache or whole products, and collectives that cost nothing."""
    one = large("diagonal")
    four = replace(one, devices=4)
    assert four.cache_bytes(256) == one.cache_bytes(256) / 4
    for whole, part in zip(one.forwards, four.forwards):
        for a, b in zip(whole.gemms, part.gemms, strict=True):
            assert a.flops == b.flops * (1 if a.linear.name in ("gate", "condition_embedding.table") else 4)
    at = {name: each[1] for name, each in OPERATORS.items()}
    n, seconds = Prediction(four, "graphs", GPUS["h200"])._together(four.forwards[1], at)
    assert n == 2 * one.layers + 4
    assert seconds == pytest.approx(n * at["collective"])  # two states are soon moved
    with pytest.raises(ValueError, match="tensor_parallel is 3"):
        _ = replace(one, devices=3).forwards
    with pytest.raises(ValueError, match="fused does not know --tensor-parallel"):
        prediction(four, "fused", GPUS["h200"])
