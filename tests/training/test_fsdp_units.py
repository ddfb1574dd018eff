"""Every kind of model, cut into units in this process: losses, gradients and samples as without."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_toys import GRID, LEVELS, NO_DROPOUT, OPTIONS

from flashar_pl.backbones import TextFeatures
from flashar_pl.checkpoints.description import build_model, build_on_meta
from flashar_pl.decoding import generate
from flashar_pl.models import GridModel
from flashar_pl.training.config import BackboneConfig, FlashARConfig, model_config
from flashar_pl.training.sharded.units import local, recompute_blocks, shard

TEXT = {"condition": "text", "caption_dim": 12, "num_classes": 1}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "raster": ({}, {"kind": "raster"}),
    "flashar": ({}, {"kind": "flashar", "branch_layer": 1}),
    "text": (TEXT, {"kind": "flashar", "branch_layer": 0, "vertical_layers": 1}),
    "intra": ({}, {"kind": "flashar", "branch_layer": 1, "intra": {"groups": 2}}),
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
        torch.manual_seed(3)  # groups of a diagonal
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


def test_the_34b_recipe_in_shards_of_eight() -> None:
    """On the meta device and a process group without processes: an eighth of every parameter, up to padding, is held by
    each GPU, and no unit that is gathered at once is larger than the embedding."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = BackboneConfig(preset="emu35-34b")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    model = build_on_meta(model_config(config, FlashARConfig(branch_layer=60)))
    total = sum(parameter.numel() for parameter in model.parameters())
    shard(model, init_device_mesh("cpu", (8,)))
    held = sum(local(parameter).numel() for parameter in model.parameters())
    assert total == 35_954_009_729
    assert held == pytest.approx(total / 8, rel=1e-6)
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    inside = {m: sum(p.numel() for p in m.parameters()) for m in units}
    own = [n - sum(inside[c] for c in _nearest_units(m)) for m, n in inside.items()]
    assert max(own) == 282_926 * 5_120


def _nearest_units(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Units below `module` that are in no other unit below it."""
    found: list[torch.nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, FSDPModule) else _nearest_units(child)
    return found
