"""The planner's arithmetic for a frozen backbone with LoRA, against real training steps."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_planner_decode import build
from test_planner_training import ONE_GPU, SMALL, SMALL_EMU, condition_for, kept_for_backward, make
from torch.utils.flop_counter import FlopCounterMode

from flashar_pl.commands.plan import HardwareOptions, RunOptions, plan
from flashar_pl.grid import make_plan
from flashar_pl.models.base import STAGE1_ROLES
from flashar_pl.models.lora import LoraConfig, adapt, frozen_names
from flashar_pl.planner.advice import what_would_fit
from flashar_pl.planner.sizes import model_sizes
from flashar_pl.planner.training import (
    TrainingSetup,
    activation_bytes,
    adapted_block_activations,
    added,
    host_bytes,
    peak_total,
    step_flops,
    training_memory,
    usable,
)
from flashar_pl.training.averaging import average_of
from flashar_pl.training.config import OptimiserConfig
from flashar_pl.training.optim import adamw

LORA = LoraConfig(rank=6, base="bf16", targets=("wqkv", "wo", "w2"))
BACKBONES = pytest.mark.parametrize("backbone", [SMALL, SMALL_EMU], ids=["llamagen", "emu35"])
RECIPE = Path(__file__).parents[2] / "experiments" / "emu35_34b_lora.yaml"


def freeze(model, stage):
    frozen, roles = frozen_names(model), model.roles()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and (stage == 2 or roles[name] in STAGE1_ROLES))


@pytest.mark.parametrize("stage", [1, 2])
@BACKBONES
def test_weights_gradients_and_moments_of_a_real_step(backbone, stage):
    """Guards a frozen backbone that is counted with gradients, or at four bytes, or LoRA's matrices left out."""
    sizes, model = make(backbone)
    adapt(model, LORA)
    freeze(model, stage)
    optimiser = adamw(model, OptimiserConfig(lr=1e-3))
    codes = torch.randint(0, model.backbone.vocabulary, (2, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(codes, condition_for(sizes, 2))["loss"].backward()
    optimiser.step()
    setup = TrainingSetup(grid=(4, 4), samples=2, lora=LORA, ema=True, **ONE_GPU)
    planned = training_memory(sizes, setup, stage)
    assert added(sizes, LORA) == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    weights = sum(p.nbytes for p in model.parameters())
    assert planned.weights == weights
    average = average_of(model, None)
    both = {p.data_ptr(): p.nbytes for net in (model, average) for p in net.parameters()}
    assert planned.ema == sum(both.values()) - weights > 0  # the frozen part is shared
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned.moments == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimiser.state.values())
    offloaded = replace(setup, offload=True, sharded=True, ema=False)
    trained = sum(p.numel() for group in optimiser.param_groups for p in group["params"])
    assert host_bytes(sizes, offloaded) == weights + 12 * trained


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=6), LoraConfig(rank=6, targets=("wo",))])
@BACKBONES
def test_activations_of_one_block(backbone, lora):
    """As FSDP2 gathers it in bfloat16: autograd's own count, with all projections adapted and with some."""
    sizes, model = make(backbone)
    adapt(model, lora).bfloat16()
    block, plan_ = model.backbone.blocks[0], make_plan("diagonal", 8, 8)
    rope = model.rope(plan_, model.backbone.prefix(condition_for(sizes, 16)))[:1, 1:]
    x = torch.randn(16, 64, sizes.dim).bfloat16().requires_grad_()
    kept = kept_for_backward(block, lambda: block(x, rope, None), rope) / (16 * 64)
    planned = adapted_block_activations(sizes, lora, 2, 2)
    assert kept == pytest.approx(planned, rel=0.02)


def counted_flops(model, sizes) -> int:
    codes = torch.randint(0, model.backbone.vocabulary, (4, 4, 4))
    with FlopCounterMode(display=False) as counter:
        model.loss(codes, condition_for(sizes, 4))["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_that_freezing_saves(stage):
    """The difference that LoRA makes to torch's own count of a step; the first layer's inputs need no gradient."""
    sizes, model = make(SMALL)
    freeze(model, stage)
    plain = counted_flops(model, sizes)
    adapt(model, replace(LORA, base="fp32"))
    freeze(model, stage)
    setup = TrainingSetup(grid=(4, 4), samples=4, **ONE_GPU)
    planned = step_flops(sizes, setup, stage) - step_flops(sizes, replace(setup, lora=LORA), stage)
    assert plain - counted_flops(model, sizes) == pytest.approx(planned, rel=0.15)
    assert (planned > 0) == (stage == 2)


def test_an_mlp_of_text_alone_is_counted():
    """It runs on the prefix alone (MammothModa2): on every position it was 40 % of a step, uncounted 29 % too few."""
    plain = {**SMALL_EMU, "kind": "decoder", "eol_token_id": 60, "visual_token_offset": 62, "num_visual_codes": 190}
    plain |= {"heads": "visual", "qk_norm": "none"}
    setup, flops, kept, planned = TrainingSetup(grid=(4, 4), samples=4, **ONE_GPU), [], [], []
    for own in ({}, {"first_image_token": 60, "image_layers": (1, 4)}):
        sizes, model = make({**plain, **own}, branch_layer=3)
        flops.append(counted_flops(model, sizes))
        step = partial(model.loss, torch.zeros(4, 4, 4).long(), condition_for(sizes, 4))
        kept.append(kept_for_backward(model, step))
        planned.append((step_flops(sizes, setup), activation_bytes(sizes, setup)))
        adapt(model, LORA)
        assert added(sizes, LORA) == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert sizes.text_layers == (3, 1)
    assert sizes.block_parameters == sum(p.numel() for p in build(sizes.config).backbone.blocks[1].parameters())
    assert flops[1] - flops[0] == pytest.approx(planned[1][0] - planned[0][0], rel=0.1)
    assert kept[1] - kept[0] == pytest.approx(planned[1][1] - planned[0][1], rel=0.1)


def test_the_recipe_fits_where_it_says(capsys):
    """One node of 80 GB and one H200, as the file is; and on the H200 with room when samples come one by one."""
    node = plan(RunOptions(config=str(RECIPE)), HardwareOptions(gpus=8, gpu_memory=80))
    one = plan(RunOptions(config=str(RECIPE)), HardwareOptions(gpus=1, gpu_memory=141))
    roomy = plan(RunOptions(config=str(RECIPE), samples=1), HardwareOptions(gpus=1, gpu_memory=141))
    assert node["fits"]
    assert one["fits"]
    assert roomy["memory"]["stage2"]["total"] < 128e9
    extra = roomy["memory"]["stage2"]["transient"] - one["memory"]["stage2"]["transient"]
    assert extra == 2 * 4 * 5120 * 131072, "gradients of the heads, beside those of earlier forwards"
    assert roomy["setup"]["accumulate"] * roomy["setup"]["samples"] == 8 * node["setup"]["samples"]
    assert roomy["time"] == one["time"]
    assert node["parameters"]["lora"] == 64 * 16 * ((5120 + 10240) + (8192 + 5120) + (5120 + 51200) + (25600 + 5120))
    out = capsys.readouterr().out
    assert "frozen bfloat16 backbone with LoRA of rank 16" in out
    assert "| trained " in out


def test_a_float32_base_is_advised_against():
    sizes = model_sizes({"backbone": {"preset": "emu35-34b", "heads": "visual"}, "branch_layer": 60})
    setup = TrainingSetup(grid=(32, 32), gpus=4, moments="bf16", lora=LoraConfig())
    room = usable(int(60e9))
    assert peak_total(sizes, setup) > room
    assert "model.lora.base: bf16" in what_would_fit(sizes, setup, room)[0][0]


def test_lora_is_advised_where_a_full_run_does_not_fit():
    """One H200 and a 34 B model: nothing else but CPU memory helps."""
    sizes = model_sizes({"backbone": {"preset": "emu35-34b", "heads": "visual"}, "branch_layer": 60})
    setup = TrainingSetup(grid=(32, 32), gpus=1, moments="bf16")
    advice = dict(what_would_fit(sizes, setup, usable(int(141e9))))
    assert any("LoRA" in text for text in advice)
    assert all("LoRA" in text or "CPU memory" in text for text in advice)


def test_unknown_lora_options_are_refused(tmp_path):
    """As `flashar fit` would refuse them."""
    file = tmp_path / "run.yaml"
    file.write_text("model: {backbone: {preset: llamagen-b}, flashar: {branch_layer: 11}, lora: {range: 4}}\n")
    with pytest.raises(ValueError, match=r"no configuration key 'model\.lora\.range'; closest: model.lora.rank"):
        plan(RunOptions(config=str(file)))
