"""FlexAttention in training, uncompiled: what it does on a GPU, computed by torch on a CPU."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from flashar_pl.backbones.condition import Given
from flashar_pl.grid import diagonal_plan, raster_plan
from flashar_pl.layers.flex import BlockedMask
from flashar_pl.layers.torch_private import recompile_limit
from flashar_pl.models import FlashAR
from flashar_pl.models.base import GridModel
from flashar_pl.models.baselines.block_diffusion import BlockDiffusion
from flashar_pl.models.baselines.par import PAR
from flashar_pl.models.baselines.plans import block_plan, region_plan
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.training import compiled
from flashar_pl.training.compiled import CompileBlocks
from flashar_pl.training.flex import FlexMasks, flex_masks, refusal

PLANS = [diagonal_plan(4, 4), raster_plan(4, 4), region_plan(4, 4, 4), block_plan(4, 4, "row")]


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses gradients on a CPU, where only its compiled form lacks them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    with warnings.catch_warnings(), recompile_limit(64):
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        yield


def flexible(model: GridModel, kernel: Callable[..., Tensor] = torch_flex.flex_attention) -> FlexMasks:
    return FlexMasks(model.backbone, kernel)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_mask(plan, masked: bool) -> None:
    """Position by position, of every plan that trains, with padded prefixes and without."""
    backbone = tiny.backbone(condition="text")
    prefix = backbone.prefix(tiny.captions([2, 5, 1], masked=masked))
    wanted = backbone.sequence_mask(plan, prefix, plan.n_inputs).squeeze(1)
    found = FlexMasks(backbone, torch_flex.flex_attention).blocked(plan, prefix, plan.n_inputs).blocks
    n, rows = wanted.shape[-1], len(wanted)
    seen = torch_flex.create_mask(found.mask_mod, rows, 1, n, n, device="cpu").squeeze(1)
    assert torch.equal(seen, wanted)


def losses(model: GridModel, *given: Given) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(0)  # of what block diffusion hides
    loss = model.loss(*given)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def text() -> GridModel:
    return tiny.flashar(condition="text")


CASES = {
    "diagonal": (tiny.flashar, lambda: tiny.classes(2), None),
    "diagonal, padded text": (text, lambda: tiny.captions([2, 5]), None),
    "raster, padded text": (text, lambda: tiny.captions([2, 5]), raster_plan(4, 4)),
    "prompts, row ends": (tiny.emu_flashar, lambda: [torch.tensor([3, 4, 8]), torch.tensor([8])], None),
    "PAR": (lambda: PAR(tiny.backbone(), 4), lambda: tiny.classes(2), None),
    "BlockDiffusion": (lambda: BlockDiffusion(tiny.backbone(), "row"), lambda: tiny.classes(2), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_bool_masks(name: str, on_a_cpu: None) -> None:
    make, condition, plan = CASES[name]
    model = make().double()
    given = [tiny.codes(2, 4, 4), condition()] + ([] if plan is None else [plan])
    wanted, gradients = losses(model, *given)
    masks = flexible(model)
    with flex_masks([masks]):
        found, others = losses(model, *given)
    assert masks.fits
    assert "attention_mask" not in vars(model.backbone)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert float((others[key] - gradient).abs().max()) <= 1e-11 * float(gradient.abs().max()), key


def test_what_does_not_fit_is_not_used() -> None:
    """A kernel that ignores the mask, and one that does not run, as on a CPU; the loss is that of bool masks."""
    model, given = tiny.flashar(), (tiny.codes(2, 4, 4), tiny.classes(2))
    wanted, _ = losses(model, *given)

    def all_see_all(q: Tensor, k: Tensor, v: Tensor, block_mask: object, enable_gqa: bool) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for kernel, cause in ((all_see_all, "its values differ"), (torch_flex.flex_attention, "backward on CPU")):
        masks = flexible(model, kernel)
        with flex_masks([masks]), pytest.warns(UserWarning, match=f"goes on without FlexAttention: .*{cause}"):
            found, _ = losses(model, *given)
        assert torch.equal(found, wanted)
        assert masks.fits is False


def test_blocks_of_a_plan_are_made_once() -> None:
    model = tiny.flashar()
    masks, prefix = flexible(model), model.backbone.prefix(tiny.classes(2))
    plan = diagonal_plan(4, 4)
    one, other = (masks.blocked(plan, prefix, plan.n_inputs) for _ in range(2))
    assert one.blocks is other.blocks
    assert isinstance(one, BlockedMask)


def test_masks_of_all_lengths_are_not_kept() -> None:
    """Prompts of a batch have a length of their own: 32 masks of an Emu3.5 image are 0.6 GB that no plan counts."""
    model, plan = tiny.emu_flashar(), diagonal_plan(4, 4)
    masks = flexible(model)
    made = [
        weakref.ref(masks.blocked(plan, model.backbone.prefix([torch.full((n,), 3)]), plan.n_inputs).blocks)
        for n in range(1, 13)
    ]
    assert sum(each() is not None for each in made) <= 4


@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_it_is_there_while_a_gpu_trains(attention: Literal["auto", "dense"], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an option that does nothing, and masks that stay for validation or for the next run."""
    model = tiny.flashar()
    module: Any = SimpleNamespace(device=torch.device("cuda"), net=model, modules=model.modules)
    monkeypatch.setattr(compiled, "refusal", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    callback, trainer, found = CompileBlocks(attention), cast(Any, None), []
    for hook in ("train_start", "validation_start", "validation_end", "train_end"):
        getattr(callback, f"on_{hook}")(trainer, module)
        found.append(isinstance(vars(model.backbone).get("attention_mask"), FlexMasks))
    assert found == [attention == "auto", False, attention == "auto", False]


def test_models_that_it_would_change_are_refused() -> None:
    assert refusal(tiny.flashar()) is None
    dropping = FlashAR(tiny.backbone(attn_dropout=0.1), 1)
    assert "dropout" in str(refusal(dropping))
    assert not ReleasedFlashAR.vertical_sees_prefix
    with pytest.raises(ValueError, match="expected auto or dense"):
        CompileBlocks("flex")  # type: ignore[arg-type]
