"""`flashar plan`: what a file or a preset says is planned, and a run that does not fit comes with advice."""

import json
from pathlib import Path

import pytest
import yaml

from flashar_pl.commands.plan import HardwareOptions, RunOptions, plan
from flashar_pl.planner.advice import GPUS, gpus_that_fit, what_would_fit
from flashar_pl.planner.sizes import model_sizes
from flashar_pl.planner.training import TrainingSetup, peak_total, usable

RECIPE = Path(__file__).parents[2] / "experiments" / "llamagen_l_256.yaml"


def test_the_largest_of_several_grids_counts(tmp_path):
    """Guards a directory of grids planned as the family's usual one; memory follows from the longest sequence."""
    for grid in ([32, 32], [27, 40], [16, 64]):
        folder = tmp_path / f"{grid[0]}x{grid[1]}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"grid": grid}))
    values = {"model": {"backbone": {"preset": "llamagen-b"}}, "data": {"shards": str(tmp_path), "batch_size": 8}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    result = plan(RunOptions(config=str(tmp_path / "run.yaml")), HardwareOptions(gpus=8))
    assert list(result["setup"]["grid"]) == [27, 40]
    (tmp_path / "manifest.json").write_text('{"grid": [16, "16"]}')
    with pytest.raises(ValueError, match=r"manifest.json has the grid"):
        plan(RunOptions(config=str(tmp_path / "run.yaml")), HardwareOptions(gpus=8))


def test_the_published_recipe(run, work):
    """The paper's LlamaGen-L: 62,550 steps of batch 512 on 8 H20, with float32 state and without sharding."""
    code, out, err = run("plan", "--config", RECIPE, "--gpus", 8, "--gpu-memory", 96, "--out", "plan.json")
    assert code == 0, err
    result = json.loads((work / "plan.json").read_text())
    assert result["parameters"]["vertical_head"] == 1024 * 16384
    assert result["setup"]["samples"] == 64
    assert result["setup"]["total_steps"] == 62_550
    assert result["setup"]["grid"] == [16, 16]
    assert result["fits"]
    assert result["memory"]["stage2"]["moments"] == 8 * 372_798_593
    assert [each["steps"] for each in result["decode"]] == [256, 31]
    assert "fits: " in out
    assert "guessed from the name data/imagenet_256" in out


def test_options_win_over_the_file(capsys):
    result = plan(
        RunOptions(config=str(RECIPE), samples=2, strategy="fsdp", moments="8bit", grid="24x24", steps=7, replicas=2)
    )
    setup = result["setup"]
    assert (setup["samples"], setup["sharded"], setup["moments"]) == (2, True, "8bit")
    assert (setup["grid"], setup["total_steps"], setup["replicas"]) == ((24, 24), 7, 2)


SHARDED = """
model:
  backbone: {{preset: emu35-34b}}
  flashar: {{branch_layer: 60}}
  schedule: {{stage1_share: 0.2}}
data: {{batch_size: 16}}
trainer:
  max_steps: 50000
  accumulate_grad_batches: 2
  strategy:
    class_path: flashar_pl.training.sharded.strategy.ShardedStrategy
    init_args: {options}
"""


def test_the_strategy_of_a_file_is_read(work, capsys):
    """Guards the sizing of sharded runs: every argument of the strategy changes the memory."""
    from flashar_pl.training.sharded.strategy import ShardedStrategy

    options = {"compute": "bf16", "replicas": 2, "recompute": True, "offload": False}
    ShardedStrategy(**options)  # these names exist
    (work / "run.yaml").write_text(SHARDED.format(options=json.dumps(options)))
    setup = plan(RunOptions(config="run.yaml"), HardwareOptions(gpus=16))["setup"]
    assert (setup["sharded"], setup["replicas"], setup["checkpointing"], setup["mixed"]) == (True, 2, True, True)
    assert (setup["samples"], setup["accumulate"], setup["moments"], setup["grid"]) == (1, 2, "fp32", (32, 32))
    options |= {"compute": "fp32", "offload": True, "recompute": False}
    (work / "other.yaml").write_text(SHARDED.format(options=json.dumps(options)))
    result = plan(RunOptions(config="other.yaml"), HardwareOptions(gpus=16))
    assert [result["setup"][name] for name in ("mixed", "offload", "checkpointing")] == [False, True, False]
    assert result["host_bytes_per_process"] == 16 * sum(result["parameters"].values()) // 8
    assert result["parameters"]["vertical_head"] == 131072 * 5120  # visual heads, as in training


def test_advice_where_a_run_does_not_fit(capsys):
    """Guards against advice that does not help: every change named must fit."""
    result = plan(RunOptions(preset="emu35-34b"), HardwareOptions(gpus=8, gpu_memory=80))
    assert not result["fits"]
    assert result["changes"]
    assert all(total <= result["gpu"]["usable"] for _, total in result["changes"])
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    name = "smaller optimizer state (model.optimiser.state: 8bit)"
    assert name in out
    better = plan(RunOptions(preset="emu35-34b", moments="8bit"), HardwareOptions(gpus=8, gpu_memory=80))
    assert better["fits"]
    assert max(stage["total"] for stage in better["memory"].values()) == dict(result["changes"])[name]
    larger = plan(RunOptions(preset="emu35-34b"), HardwareOptions(gpus=result["gpus_that_fit"], gpu_memory=80))
    assert larger["fits"]


def test_changes_are_combined_where_one_is_not_enough():
    sizes = model_sizes({"backbone": {"preset": "llamagen-3b"}})
    setup = TrainingSetup(grid=(24, 24), gpus=1, samples=64, sharded=False, checkpointing=False)
    assert len(what_would_fit(sizes, setup, usable(40 * 10**9))) == 1
    ((text, total),) = what_would_fit(sizes, setup, usable(40 * 10**9))
    assert "activation checkpointing" in text
    assert ";" in text
    ((text, _),) = what_would_fit(sizes, setup, usable(20 * 10**9))
    assert text.count("forwards") == 1, "halved more than once; the last size is what to set"
    assert "trainer.accumulate_grad_batches" in text
    assert total <= usable(40 * 10**9)
    assert what_would_fit(sizes, setup, 10**9) == []
    assert gpus_that_fit(sizes, setup, 10**9) is None
    assert peak_total(sizes, setup) > usable(40 * 10**9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --config"),
        (["--config", "none.yaml"], "no configuration none.yaml"),
        (["--config", "list.yaml"], "expected keys with values"),
        (["--config", "broken.yaml"], "not YAML"),
        (["--config", "wrong.yaml"], "no configuration key 'model.backbone.size'"),
        (["--config", "lora.yaml"], "model.init_from is null"),
        (["--config", "odd.yaml", "--gpu-memory", "-5"], "gpu_memory is -5.0; expected 1 or more"),
        (["--config", "odd.yaml", "--gpus", "3"], "data.batch_size 64 is the global batch and no multiple of 3"),
        (["--preset", "llamagen-b", "--mfu", "40"], "mfu is 40"),
        (["--preset", "llamagen-b", "--strategy", "ddp", "--offload", "on"], "only sharded parameters"),
        (["--preset", "llamagen-b", "--gpus", "0"], "gpus is 0"),
        (["--preset", "llamagen-b", "--out", "list.yaml"], "exists"),
    ],
)
def test_wrong_input_is_refused(words, message, refused, work):
    (work / "list.yaml").write_text("- a\n")
    (work / "broken.yaml").write_text("model: [\n")
    (work / "odd.yaml").write_text("model: {backbone: {preset: llamagen-b}}\ndata: {batch_size: 64}\n")
    (work / "wrong.yaml").write_text("model: {backbone: {size: 3}}\n")
    base = "model: {backbone: {preset: llamagen-b}"
    (work / "lora.yaml").write_text(f"{base}, flashar: {{branch_layer: 11}}, lora: {{rank: 4}}}}\n")
    assert message in refused("plan", *words)


STRATEGY = """
model: {{backbone: {{preset: llamagen-b}}, flashar: {{branch_layer: 11}}}}
trainer:
  max_steps: 10
  strategy: {{class_path: flashar_pl.training.sharded.strategy.ShardedStrategy, init_args: {{{options}}}}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("compute: bf16", "recomput: true", "'trainer.strategy.init_args.recomput'; closest: recompute"),
        ("compute: bf16", "compute: fp16", "trainer.strategy.init_args.compute is 'fp16'; expected bf16 or fp32"),
        ("ShardedStrategy", "ShardedStrategi", "has no attribute 'ShardedStrategi'"),
        ("max_steps", "max_step", "no configuration key 'trainer.max_step'; closest: trainer.max_steps"),
        ("branch_layer: 11", "branch_layer: top", "branch_layer"),
        ("preset: llamagen-b", "preset: llamagen-b, options: {dim: wide}", "dim is 'wide'; expected a whole"),
        ("flashar:", "optimiser: 3, flashar:", "model.optimiser is 3; expected keys with values"),
        ("flashar:", "aux_weight: -1, flashar:", "aux_weight is -1"),
        (
            "branch_layer: 11",
            "branch_layer: 11, fusion: mean",
            "model.flashar.fusion is 'mean'; expected gate or logit_gate or average",
        ),
    ],
)
def test_a_file_is_checked_as_a_fit_checks_it(old, new, message, refused, work):
    """Guards plans of what is not in the file: a key below trainer that nobody reads, text where numbers are due."""
    good = STRATEGY.format(options="compute: bf16")
    assert old in good
    (work / "run.yaml").write_text(good.replace(old, new))
    assert message in refused("plan", "--config", "run.yaml", "--gpus", "1")


def test_grid_comes_from_the_shards_where_they_are(shards, work, capsys):
    text = f"model: {{backbone: {{preset: llamagen-b}}}}\ndata: {{shards: {shards}}}\ntrainer: {{max_steps: 10}}\n"
    (work / "run.yaml").write_text(text)
    result = plan(RunOptions(config="run.yaml"), HardwareOptions(gpus=1))
    assert result["setup"]["grid"] == (8, 8)
    assert result["setup"]["plan"] == "raster"
    assert result["notes"] == []
    assert GPUS[result["gpu"]["name"]].memory == 96
