"""The planner's training arithmetic against real training steps."""

from unittest.mock import patch

import pytest
import torch
from test_planner_decode import EMU, TINY, build

from flashar_pl.devices import resident_memory
from flashar_pl.grid import make_plan
from flashar_pl.models.base import STAGE1_ROLES
from flashar_pl.planner.sizes import model_sizes
from flashar_pl.planner.training import (
    TrainingSetup,
    activation_bytes,
    block_activations,
    host_bytes,
    peak_total,
    step_flops,
    training_memory,
    training_time,
)

SMALL = {**TINY, "dim": 64, "n_layer": 3, "n_head": 4, "multiple_of": 32, "vocab_size": 300}
SMALL |= {"resid_dropout": 0.0, "ffn_dropout": 0.0, "token_dropout": 0.0}  # a CPU keeps dropout masks as floats
SMALL_EMU = {**EMU, "dim": 48, "head_dim": 16, "ffn_dim": 96, "vocab_size": 260, "visual_token_offset": 60}
ONE_GPU = {"gpus": 1, "sharded": False, "checkpointing": False, "mixed": False, "prefix": 1}


def make(backbone, branch_layer=2):
    config = {"kind": "flashar", "backbone": backbone, "branch_layer": branch_layer}
    torch.manual_seed(0)
    return model_sizes(config), build(config).train()


def condition_for(sizes, batch):
    return [torch.tensor([5])] * batch if sizes.backbone.row_ends else torch.arange(batch) % 5


def freeze(model, stage):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == 2 or model.roles()[name] in STAGE1_ROLES)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("backbone", [SMALL, SMALL_EMU], ids=["llamagen", "emu35"])
def test_weights_gradients_and_moments_of_a_real_step(backbone, stage):
    """Guards the sizing of clusters: these three are most of a large model's memory."""
    sizes, model = make(backbone)
    freeze(model, stage)
    optimiser = torch.optim.AdamW(model.parameters())
    codes = torch.randint(0, model.backbone.vocabulary, (2, 4, 4))
    model.loss(codes, condition_for(sizes, 2))["loss"].backward()
    optimiser.step()
    setup = TrainingSetup(grid=(4, 4), samples=2, **ONE_GPU)
    planned = training_memory(sizes, setup, stage)
    assert planned.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.01)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned.gradients == pytest.approx(gradients, rel=0.01)
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimiser.state.values())
    assert planned.moments == pytest.approx(moments, rel=0.01)


class FusedNorm(torch.autograd.Function):
    """`F.rms_norm` as the kernel of GPUs: it keeps its input, its weight and 1 / rms. On a CPU torch keeps more."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse * weight).type_as(x)


def kept_for_backward(model, call, shared=()) -> int:
    """Bytes of distinct storages that autograd saves during `call`, parameters and what all blocks share excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *shared)}
    seen, keep = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # a freed address would be counted once for two tensors
        return tensor

    def norm(x, shape, weight, eps):
        return FusedNorm.apply(x, weight, eps)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, patch("torch.nn.functional.rms_norm", norm):
        call()
    return sum(seen.values())


@pytest.mark.parametrize("mode", ["float32", "autocast", "fsdp"])
@pytest.mark.parametrize("backbone", [SMALL, SMALL_EMU], ids=["llamagen", "emu35"])
def test_activations_of_one_block(backbone, mode):
    """Guards the activation column: autograd's own count of one block in float32, under autocast, and in bfloat16."""
    sizes, model = make(backbone)
    block = model.backbone.blocks[0]
    plan = make_plan("diagonal", 8, 8)
    prefix = model.backbone.prefix(condition_for(sizes, 16))
    rope = model.rope(plan, prefix)[:1, 1:]
    x = torch.randn(16, 64, sizes.dim, requires_grad=True)
    residual, compute = {"float32": (4, 4), "autocast": (4, 2), "fsdp": (2, 2)}[mode]
    if mode == "fsdp":  # parameters are gathered in bfloat16
        block.bfloat16()
        x = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        kept = kept_for_backward(block, lambda: block(x, rope, None), rope)
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim > 1) if mode == "autocast" else 0
    planned = block_activations(sizes, residual, compute) * 16 * 64
    assert kept - casts == pytest.approx(planned, rel=0.02)


def test_activations_of_a_whole_step():
    """Layers, final norms and hidden states of both branches; the loss keeps no logits."""
    sizes, model = make(SMALL)
    codes = torch.randint(0, 300, (16, 8, 8))
    kept = kept_for_backward(model, lambda: model.loss(codes, condition_for(sizes, 16)))
    setup = TrainingSetup(grid=(8, 8), samples=16, **ONE_GPU)
    assert kept == pytest.approx(activation_bytes(sizes, setup), rel=0.15)
    assert activation_bytes(sizes, setup, stage=1) < 0.5 * activation_bytes(sizes, setup)


def test_flops_follow_the_tokens():
    """6 N D for a plain step without attention and heads; recomputation adds a third."""
    sizes = model_sizes({"kind": "raster", "backbone": {"preset": "llamagen-l"}})
    plain = TrainingSetup(grid=(16, 16), plan="raster", samples=4, checkpointing=False)
    blocks = sizes.backbone.n_layer * sizes.block_parameters
    tokens = 4 * 256
    head = 3 * 2 * 4 * 256 * 16384 * 1024
    attention = 12 * tokens * 256 * 1024 * 24
    assert step_flops(sizes, plain) - head - attention == pytest.approx(6 * blocks * tokens, rel=1e-3)
    again = TrainingSetup(grid=(16, 16), plan="raster", samples=4, checkpointing=True)
    assert (step_flops(sizes, again) - head) == pytest.approx((step_flops(sizes, plain) - head) * 4 / 3)


def test_stage_1_is_cheaper_than_stage_2():
    sizes = model_sizes({"backbone": {"preset": "llamagen-l"}})
    setup = TrainingSetup(grid=(16, 16))
    assert step_flops(sizes, setup, 1) < 0.45 * step_flops(sizes, setup, 2)
    assert training_memory(sizes, setup, 1).total < training_memory(sizes, setup, 2).total
    time = training_time(sizes, setup, peak=148e12, mfu=0.4)
    expected = 50_000 * (0.2 * time["step_seconds"]["stage1"] + 0.8 * time["step_seconds"]["stage2"]) / 3600
    assert time["hours"] == pytest.approx(expected)
    assert time["gpu_hours"] == pytest.approx(8 * expected)


def test_the_34b_model_on_one_node_of_96_gb():
    """Guards the default of the 34B recipe: float32 moments do not fit 8 x 96 GB, bfloat16 and 8-bit ones do."""
    sizes = model_sizes({"backbone": {"preset": "emu35-34b", "heads": "visual"}, "branch_layer": 60})
    fp32 = TrainingSetup(grid=(32, 32), moments="fp32")
    eight = TrainingSetup(grid=(32, 32), moments="8bit")
    offload = TrainingSetup(grid=(32, 32), offload=True)
    assert training_memory(sizes, fp32).moments == 8 * sizes.n_parameters // 8
    bf16 = TrainingSetup(grid=(32, 32), moments="bf16")
    assert peak_total(sizes, eight) < peak_total(sizes, bf16) < 0.8 * 96e9 < 0.9 * 96e9 < peak_total(sizes, fp32)
    assert peak_total(sizes, offload) < 40e9
    assert host_bytes(sizes, offload) == 2 * sizes.n_parameters
    assert host_bytes(sizes, eight) == 0
    copied = TrainingSetup(grid=(32, 32), moments="bf16", background=True)
    assert host_bytes(sizes, copied) == sizes.n_parameters  # 8 bytes a parameter, on 8 GPUs


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gpus": 8, "replicas": 3}, "cannot hold 3 replicas"), ({"samples": 0}, "samples is 0; expected 1 or more")],
)
def test_wrong_setups_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingSetup(grid=(4, 4), **options)


@pytest.mark.slow
def test_resident_memory_after_a_real_step():
    """Not a count of tensors but what the process holds: weights, gradients and moments, within 10 %."""
    config = {"kind": "flashar", "backbone": {**SMALL, "dim": 512, "vocab_size": 16384}, "branch_layer": 2}
    sizes = model_sizes(config)
    before = resident_memory()
    model = build(config).train()
    optimiser = torch.optim.AdamW(model.parameters())
    model.loss(torch.randint(0, 16384, (1, 2, 2)), torch.tensor([1]))["loss"].backward()
    optimiser.step()
    if not before:
        pytest.skip("this system does not report resident memory")
    planned = training_memory(sizes, TrainingSetup(grid=(2, 2), **ONE_GPU), 2)
    arithmetic = planned.weights + planned.gradients + planned.moments
    assert arithmetic > 5e8
    assert resident_memory() - before == pytest.approx(arithmetic, rel=0.1)
