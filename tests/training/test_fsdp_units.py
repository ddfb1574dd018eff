"""Every kind of model, cut into units in this process: losses, gradients and samples as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_toys import GRID, LEVELS, NO_DROPOUT, OPTIONS

from flashar_pl.backbones import TextFeatures
from flashar_pl.decoding import generate
from flashar_pl.models import GridModel
from flashar_pl.models.weights import build_model
from flashar_pl.training.sharding import recompute_blocks, shard

TEXT = {"condition": "text", "caption_dim": 12, "num_classes": 1}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "raster": ({}, {"kind": "raster"}),
    "flashar": ({}, {"kind": "flashar", "branch_layer": 1}),
    "text": (TEXT, {"kind": "flashar", "branch_layer": 0, "vertical_layers": 1}),
    "average": ({}, {"kind": "flashar", "branch_layer": 2, "fusion": "average", "corner": "fused"}),
}


@pytest.fixture
def mesh(tmp_path) -> DeviceMesh:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def make(kind: str) -> GridModel:
    """Equal weights every time, large enough that they all matter."""
    options, outer = KINDS[kind]
    torch.manual_seed(0)
    model = build_model({**outer, "backbone": {"kind": "llamagen", **OPTIONS, **NO_DROPOUT, **options}}).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def condition(kind: str) -> Any:
    torch.manual_seed(1)
    if kind != "text":
        return torch.tensor([0, 2, 1])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    return TextFeatures(torch.randn(3, 4, 12), mask)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_whole(kind: str, recompute: bool, mesh: DeviceMesh) -> None:
    """A part that is read outside its unit would be a shard, or an error; one that backward does not gather again
    would have no gradient."""
    whole, cut = make(kind), make(kind)
    if recompute:
        recompute_blocks(cut)
    shard(cut, mesh, "fp32")
    codes = torch.randint(0, LEVELS, (3, *GRID), generator=torch.Generator().manual_seed(2))
    losses = []
    for model in (whole, cut):
        found = model.loss(codes, condition(kind))
        found["loss"].backward()
        losses.append(float(found["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert isinstance(b, DTensor), name
        assert a.grad is not None, name
        torch.testing.assert_close(b.grad.full_tensor(), a.grad, atol=1e-6, rtol=1e-5, msg=name)
    drawn = [
        generate(model, condition(kind), GRID, plan=whole.plan_name, cfg_scale=1.5, seeds=3) for model in (whole, cut)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_compute_runs_everywhere(kind: str, mesh: DeviceMesh) -> None:
    """Text features come as float32, positions stay float32: a dtype that does not match would be an error."""
    model = shard(make(kind), mesh, "bf16")
    whole = make(kind)
    codes = torch.randint(0, LEVELS, (3, *GRID), generator=torch.Generator().manual_seed(2))
    found, wanted = model.loss(codes, condition(kind)), whole.loss(codes, condition(kind))
    assert float(found["loss"].detach()) == pytest.approx(float(wanted["loss"].detach()), rel=2e-2)
    assert found["nll"].dtype == torch.float32
    generate(model, condition(kind), GRID, plan=model.plan_name, cfg_scale=1.5, seeds=3)


def test_units(mesh: DeviceMesh) -> None:
    """Blocks, embeddings, the pair of heads and the gate are gathered one by one."""
    model = shard(make("flashar"), mesh)
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert units == {
        "", "backbone.condition_embedding", "backbone.code_embedding", "backbone.blocks.0", "backbone.blocks.1",
        "vertical.blocks.0", "dual_head", "dual_head.gate",
    }  # fmt: skip
