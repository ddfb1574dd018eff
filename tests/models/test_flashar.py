"""The dual-branch model: official outputs, what each branch and the gate see, and what no prediction may see."""

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import CLOSE, flashar_golden, llamagen_golden
from torch import Tensor

from flashar_pl.grid import diagonal_plan, raster_plan
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.models.base import ROLES

GRIDS = [(1, 1), (1, 4), (4, 1), (2, 3), (3, 3)]
BRANCHES = [(0, None), (1, None), (1, 1), (1, 3), (2, 2), (3, None), (3, 1), (2, 0)]
"""(m, k) for three layers: everything, fewer clones than layers left, past the end, norm and head only."""


# --- official outputs ------------------------------------------------------------------------------------------------


def test_nar_golden() -> None:
    state, arrays = llamagen_golden("nar_tiny")
    model = FlashAR.from_nar(state, n_head=4).eval()
    codes, ids = arrays["in/token_ids"].view(-1, 8, 8), arrays["in/class_ids"]
    assert torch.equal(diagonal_plan(8, 8).mask(1, order="raster"), arrays["in/attn_mask"])
    out = model(codes, ids)
    torch.testing.assert_close(out.fused.flatten(1, 2), arrays["out/logits"], **CLOSE)
    torch.testing.assert_close(out.horizontal[:1].flatten(1, 2), arrays["dbg/logits_right_raw"][:, 1:], **CLOSE)
    torch.testing.assert_close(out.vertical[:1].flatten(1, 2), arrays["dbg/logits_below_raw"][:, 1:], **CLOSE)
    losses = model.loss(codes, ids, aux_weight=0.0)
    torch.testing.assert_close(losses["loss"].detach(), arrays["out/ce_loss"], atol=1e-5, rtol=1e-5)


def test_flashar_golden_without_gate() -> None:
    state, arrays = flashar_golden("llamagen_flashar_tiny_nogate")
    model = FlashAR.from_nar(state, n_head=4).eval()
    codes, ids = arrays["in/tokens"].view(-1, 4, 4), arrays["in/class_ids"]
    assert torch.equal(diagonal_plan(4, 4).mask(1, order="raster"), arrays["in/mask"])
    out = model(codes, ids)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out.fused.flatten(1, 2), arrays["out/logits_fused"], **close)
    torch.testing.assert_close(out.horizontal.flatten(1, 2), arrays["dbg/logits_R_raw"][:, 1:], **close)
    torch.testing.assert_close(out.vertical.flatten(1, 2), arrays["dbg/logits_B_raw"][:, 1:], **close)
    torch.testing.assert_close(out.gate, arrays["out/gate"], atol=1e-5, rtol=0)
    losses = model.loss(codes, ids, aux_weight=0.0)
    torch.testing.assert_close(losses["loss"].detach(), arrays["out/loss"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses["gate"], arrays["out/gate"], atol=1e-5, rtol=0)


# --- branches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), BRANCHES)
@pytest.mark.parametrize("condition", ["class", "text"])
def test_raster_horizontal_logits_equal_the_backbones_own(m: int, k: int | None, condition: str) -> None:
    """The horizontal branch is the pre-trained model, untouched: equal to the last bit under the raster plan."""
    model = tiny.flashar(m=m, k=k, n_layer=3, condition=condition)
    given = tiny.classes(2) if condition == "class" else tiny.captions([2, 5])
    for height, width in GRIDS:
        codes, plan = tiny.codes(2, height, width), raster_plan(height, width)
        own = model.backbone.raster_logits(codes, given)
        out = model(codes, given, plan)
        assert torch.equal(out.fused, own)
        assert torch.equal(out.horizontal.flatten(1, 2)[:, :-1], own.flatten(1, 2)[:, 1:])
        assert torch.equal(RasterAR(model.backbone)(codes, given).fused, own)
        assert (out.gate == 1).all()


@pytest.mark.parametrize(("m", "k", "first"), [(0, None, 0), (1, None, 1), (1, 1, 1), (2, 3, 0), (2, 2, 1), (3, 1, 2)])
def test_vertical_layers_are_clones(m: int, k: int | None, first: int) -> None:
    """F_m..F_{m+k-1}, or the last k layers where that passes L; final norm and head with their weights."""
    model = FlashAR(tiny.backbone(n_layer=3), m, k)
    for i, block in enumerate(model.vertical.blocks):
        for key, value in block.state_dict().items():
            assert torch.equal(value, model.backbone.blocks[first + i].state_dict()[key])
    assert torch.equal(model.vertical.norm.weight, model.backbone.norm.weight)
    assert torch.equal(model.dual_head.vertical.weight, model.backbone.head.weight)  # type: ignore[union-attr]
    pointers = {parameter.data_ptr() for parameter in model.backbone.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in model.vertical.parameters()}, "clones, not aliases"


@pytest.mark.parametrize("m", [0, 1, 3])
def test_training_free_model_predicts_below_what_it_predicts_to_the_right(m: int) -> None:
    """Before any step both branches are the same function, and the gate says 0.5."""
    model = FlashAR(tiny.backbone(n_layer=3), m).eval()
    out = model(tiny.codes(2, 3, 4), tiny.classes(2))
    torch.testing.assert_close(out.vertical, out.horizontal, atol=1e-6, rtol=1e-6)
    assert (out.gate[:, 1:, 1:] == 0.5).all()
    mixed = (out.horizontal[:, 1:, :-1] + out.vertical[:, :-1, 1:]) / 2
    torch.testing.assert_close(out.fused[:, 1:, 1:], mixed, atol=1e-6, rtol=1e-5)


def test_fusion_by_definition() -> None:
    """Eq. 8: fused[p, q] = g z_H(p, q - 1) + (1 - g) z_V(p - 1, q); borders have one neighbour."""
    for fusion in ("gate", "average"):
        model = tiny.flashar(fusion=fusion)
        out = model(tiny.codes(2, 3, 4), tiny.classes(2))
        g = out.gate[:, 1:, 1:, None]
        mixed = g * out.horizontal[:, 1:, :-1] + (1 - g) * out.vertical[:, :-1, 1:]
        torch.testing.assert_close(out.fused[:, 1:, 1:], mixed, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.fused[:, 0, 1:], out.horizontal[:, 0, :-1])
        assert torch.equal(out.fused[:, 1:, 0], out.vertical[:, :-1, 0])


@pytest.mark.parametrize("corner", ["horizontal", "fused"])
@pytest.mark.parametrize("fusion", ["gate", "average"])
def test_gate_conventions(fusion: str, corner: str) -> None:
    model = tiny.flashar(fusion=fusion, corner=corner).double()
    codes, ids = tiny.codes(2, 3, 4), tiny.classes(2)
    out = model(codes, ids)
    assert (out.gate[:, 0, 1:] == 1).all()
    assert (out.gate[:, 1:, 0] == 0).all()
    inner = out.gate[:, 1:, 1:]
    assert ((inner == 0.5).all() and fusion == "average") or ((inner > 0) & (inner < 1) & (inner != 0.5)).all()
    raster = model.backbone.raster_logits(codes, ids)
    if corner == "horizontal":
        assert (out.gate[:, 0, 0] == 1).all()
        torch.testing.assert_close(out.fused[:, 0, 0], raster[:, 0, 0])
    else:
        assert (out.gate[:, 0, 0] == 0.5).all() == (fusion == "average")
        assert not torch.allclose(out.fused[:, 0, 0], raster[:, 0, 0])
    torch.testing.assert_close(model.loss(codes, ids)["gate"], out.gate)


def test_gate_by_definition() -> None:
    """Eq. 7 on the normed final states of the left and upper neighbour, in float32 under autocast too."""
    model = tiny.flashar()
    gate = model.dual_head.gate
    assert gate is not None
    assert gate.hidden.weight.shape == (64, 32), "hidden width max(64, D / 8)"
    h, v = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).split([2, 3])[0], torch.ones(2, 16)
    expected = torch.sigmoid(gate.out(F.silu(gate.hidden(torch.cat([h, v], -1))))).squeeze(-1)
    torch.testing.assert_close(gate(h, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(h, v), gate(h, v).float())
        torch.testing.assert_close(gate(h, v), expected)


# --- what a prediction sees ------------------------------------------------------------------------------------------


def _embedding_gradients(model: FlashAR, height: int, width: int, corner_only: bool = False) -> Tensor:
    """|d fused[p, q] / d embedding of token (p', q')| summed over channels: (N targets, N tokens)."""
    plan = diagonal_plan(height, width)
    seen: list[Tensor] = []

    def capture(_module: object, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.backbone.code_embedding.register_forward_hook(capture)  # type: ignore[union-attr, operator]
    fused = model(tiny.codes(1, height, width), tiny.classes(1)).fused[0].flatten(0, 1)  # (N, V)
    handle.remove()
    direction = torch.randn(fused.shape[1], generator=torch.Generator().manual_seed(1))
    rows = []
    for target in fused @ direction:
        (gradient,) = torch.autograd.grad(target, seen[0], retain_graph=True)
        rows.append(gradient[0].abs().sum(-1)[plan.slot])  # plan order -> raster order
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(3, 4), (4, 2), (1, 4), (3, 1)])
@pytest.mark.parametrize("corner", ["horizontal", "fused"])
def test_no_label_leaks(grid: tuple[int, int], corner: str) -> None:
    """No prediction depends on a token of its own or a later diagonal; every earlier token matters."""
    height, width = grid
    gradients = _embedding_gradients(tiny.flashar(corner=corner), height, width)
    for i in range(height * width):
        for j in range(height * width):
            earlier = sum(divmod(j, width)) < sum(divmod(i, width))
            assert (gradients[i, j] > 0) == earlier, (divmod(i, width), divmod(j, width))


def test_the_vertical_branch_sees_the_prefix() -> None:
    """Column 0 comes from the vertical branch alone; it must follow the class."""
    model, codes = tiny.flashar(), tiny.codes(1, 3, 3)
    fused = [model(codes, torch.tensor([label])).fused[:, 1:, 0] for label in (0, 1)]
    assert not torch.allclose(*fused)


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["gate", "average"])
@pytest.mark.parametrize("condition", ["class", "text"])
def test_roles_cover_every_parameter_once(fusion: str, condition: str) -> None:
    model = tiny.flashar(fusion=fusion, condition=condition)
    roles = model.roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert set(roles.values()) == set(ROLES) - {"added"} - (set() if fusion == "gate" else {"gate"})
    by_role = {role: {name for name in roles if roles[name] == role} for role in ROLES}
    assert by_role["horizontal_head"] == {"dual_head.horizontal.weight"}
    assert by_role["vertical_head"] == {"dual_head.vertical.weight"}
    assert all(name.startswith("vertical.") for name in by_role["vertical"])
    assert all(name.startswith("dual_head.gate.") for name in by_role["gate"])
    assert all(name.startswith("backbone.") for name in by_role["backbone"])
    raster = RasterAR(tiny.backbone(condition=condition))
    assert {name for name, role in raster.roles().items() if role == "horizontal_head"} == {"backbone.head.weight"}
    assert set(raster.roles().values()) == {"backbone", "horizontal_head"}


def test_the_head_is_registered_once() -> None:
    """Twice, an optimiser would step it twice and safetensors would refuse to save it."""
    model = tiny.flashar()
    assert "dual_head.horizontal.weight" in model.state_dict()
    assert "backbone.head.weight" not in model.state_dict()
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert model.backbone.head is model.dual_head.horizontal
    raster = RasterAR(tiny.backbone())
    assert [name for name in raster.state_dict() if "head" in name] == ["backbone.head.weight"]
    assert raster.dual_head.horizontal is raster.backbone.head


@pytest.mark.parametrize("make", [tiny.flashar, lambda: RasterAR(tiny.backbone())])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(make: object, clone: object) -> None:
    """An averaged model is a deep copy; its heads must be its own."""
    model = make()  # type: ignore[operator]
    twin = clone(model)  # type: ignore[operator]
    assert twin.backbone.head is twin.dual_head.horizontal
    assert twin.backbone.head is not model.backbone.head
    codes, ids = tiny.codes(2, 3, 3), tiny.classes(2)
    before = model(codes, ids).fused
    assert torch.equal(twin(codes, ids).fused, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(codes, ids).fused, before)
    assert not torch.equal(twin(codes, ids).fused, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_give_wide_logits_close_to_float32(dtype: torch.dtype) -> None:
    model, codes, ids = tiny.flashar(n_kv_head=1), tiny.codes(2, 3, 3), tiny.classes(2)
    expected = model(codes, ids)
    out = copy.deepcopy(model).to(dtype)(codes, ids)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.fused.dtype == out.gate.dtype == wide
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.3, torch.float16: 0.03}[dtype]
    assert (out.fused - expected.fused).abs().max() < tolerance


def test_validation_in_inference_mode_before_training() -> None:
    """What a first forward caches must serve autograd; a grid no other test uses, so nothing is cached yet."""
    model, codes, ids = tiny.flashar(), tiny.codes(2, 5, 7), tiny.classes(2)
    with torch.inference_mode():
        model.loss(codes, ids)
        model(codes, ids)
    model.loss(codes, ids)["loss"].backward()
    model(codes, ids).fused.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branch_layer": 3}, r"branch_layer is 3; expected 0 to 2"),
        ({"branch_layer": 1, "fusion": "sum"}, r"expected one of gate, logit_gate, average"),
        ({"branch_layer": 1, "corner": "vertical"}, r'expected "horizontal" or "fused"'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashAR(tiny.backbone(), **arguments)  # type: ignore[arg-type]


def test_a_plan_of_another_grid_or_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes are a \(2, 3\) grid; the plan is DecodePlan\(diagonal, 3x2"):
        tiny.flashar()(tiny.codes(1, 2, 3), tiny.classes(1), diagonal_plan(3, 2))
    with pytest.raises(ValueError, match=r"codes have shape \(2, 3\), dtype torch.int64; expected \(B, H, W\)"):
        tiny.flashar()(tiny.codes(1, 2, 3)[0], tiny.classes(1))
    with pytest.raises(ValueError, match="the diagonal plan needs a vertical head"):
        RasterAR(tiny.backbone()).make_plan("diagonal", 2, 2)
    for grid in ((2, 3), (1, 3)):
        with pytest.raises(ValueError, match="needs a vertical head"):
            RasterAR(tiny.backbone())(tiny.codes(1, *grid), tiny.classes(1), diagonal_plan(*grid))
        with pytest.raises(ValueError, match="needs a vertical head"):
            RasterAR(tiny.backbone()).loss(tiny.codes(1, *grid), tiny.classes(1), diagonal_plan(*grid))
