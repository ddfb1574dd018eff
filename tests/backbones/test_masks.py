"""Who sees whom while training: the cheap forms of the mask say what `DecodePlan.mask` says."""

import dataclasses

import pytest
import tiny
import torch

from flashar_pl.backbones import Emu35
from flashar_pl.backbones.base import Backbone, is_causal, plan_mask
from flashar_pl.backbones.emu35 import Emu35Config
from flashar_pl.grid import diagonal_plan, raster_plan
from flashar_pl.models import FlashAR
from flashar_pl.models.released import without_prefix

CPU = torch.device("cpu")
PLANS = [
    diagonal_plan(3, 5), diagonal_plan(4, 4), raster_plan(3, 5), raster_plan(3, 5, row_end=True), diagonal_plan(1, 4),
]  # fmt: skip
ODD = dataclasses.replace(PLANS[0], visible=torch.eye(15, dtype=torch.bool))
EMU = Emu35Config(
    dim=16, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, ffn_dim=32, vocab_size=60, rope_base=1e4, norm_eps=1e-6,
    visual_token_offset=40, eol_token_id=7, boi_token_id=8,
)  # fmt: skip


@pytest.mark.parametrize("plan", [*PLANS, ODD], ids=repr)
@pytest.mark.parametrize("prefix", [1, 4])
def test_the_mask_of_a_prefix_of_any_length(plan, prefix):
    whole = plan.mask(prefix)
    for n_slots in (0, 1, plan.n_inputs, plan.n_slots):
        length = prefix + n_slots
        torch.testing.assert_close(plan_mask(plan, prefix, n_slots, CPU), whole[:length, :length])


def test_which_plans_are_causal():
    """A diagonal of one cell is; a diagonal of several sees itself."""
    assert [is_causal(plan) for plan in PLANS] == [False, False, True, True, True]
    assert not is_causal(ODD)


def test_only_without_padding_is_a_raster_sequence_causal():
    backbone = tiny.backbone(condition="text")
    padded, whole = backbone.prefix(tiny.captions([2, 5])), backbone.prefix(tiny.captions([5, 5], masked=False))
    raster, diagonal = raster_plan(3, 4), diagonal_plan(3, 4)
    assert backbone.attention_mask(raster, whole, 6) == "causal"
    assert backbone.attention_mask(diagonal, whole, 0) == "causal"
    assert isinstance(backbone.attention_mask(raster, padded, 6), torch.Tensor)
    assert isinstance(backbone.attention_mask(diagonal, whole, 6), torch.Tensor)


def emu():
    torch.manual_seed(0)
    backbone = Emu35(EMU)
    tiny.randomise(backbone, 0)
    return FlashAR(backbone, 1), [torch.tensor([3, 4, 8]), torch.tensor([5, 6, 8])]


@pytest.mark.parametrize("make", [lambda: (tiny.flashar(), tiny.classes(2)), emu], ids=["llamagen", "emu35"])
def test_causal_equals_the_mask(make, monkeypatch):
    """Loss and gradients of the raster plan with the fused causal kernel, and with the mask it stands for."""
    model, condition = make()
    plan, codes = model.make_plan("raster", 3, 4), tiny.codes(2, 3, 4)
    results = []
    for slow in (False, True):
        if slow:
            monkeypatch.setattr(Backbone, "attention_mask", Backbone.sequence_mask)
        model.zero_grad()
        loss = model.loss(codes, condition, plan)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.backbone.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_hiding_the_prefix_keeps_the_order():
    """The authors' vertical branch on a raster sequence: "causal" must not become "everything"."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(without_prefix("causal", 2, 5, 5, CPU), without_prefix(mask[None, None], 2, 5, 5, CPU))


@pytest.mark.gpu
def test_a_raster_step_runs_in_the_flash_kernel():
    """A bool mask would be refused by it."""
    model = tiny.flashar().to("cuda", torch.bfloat16)
    codes, ids = tiny.codes(2, 4, 4).cuda(), tiny.classes(2).cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        model.loss(codes, ids, model.make_plan("raster", 4, 4))["loss"].backward()
