"""The chunked loss against the plain one: materialised logits and F.cross_entropy, values and every gradient."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.grid import diagonal_plan, raster_plan
from flashar_pl.models import FlashAR, RasterAR, dual_head, losses
from flashar_pl.models.base import GridModel
from flashar_pl.models.losses import AUX_WEIGHT

BATCH = 3


def plain_loss(model: GridModel, codes: Tensor, ids: Tensor, plan_name: str, valid: Tensor | None) -> dict[str, Tensor]:
    """Eq. 9 and 10 from all logits at once."""
    height, width = codes.shape[1:]
    out = model(codes, ids, (diagonal_plan if plan_name == "diagonal" else raster_plan)(height, width))
    rows = torch.ones(len(codes), dtype=torch.bool) if valid is None else valid

    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")

    def mean(values: Tensor) -> Tensor:
        return values[rows].mean() if values[rows].numel() else values.sum() * 0

    fused = nll(out.fused, codes)
    result = {"nll": fused.flatten(1).sum(1), "fused": mean(fused), "gate": out.gate}
    if plan_name == "raster":
        return {**result, "loss": result["fused"]}
    result["horizontal"] = mean(nll(out.horizontal[:, :, :-1], codes[:, :, 1:]))  # targets with q > 0
    result["vertical"] = mean(nll(out.vertical[:, :-1], codes[:, 1:]))  # targets with p > 0
    return {**result, "loss": result["fused"] + AUX_WEIGHT * (result["horizontal"] + result["vertical"])}


def gradients(model: GridModel, loss: Tensor) -> dict[str, Tensor]:
    """Zeros where a parameter takes no part."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), found)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in named}


def assert_equal_losses(
    model: GridModel, plan_name: str, grid: tuple[int, int] = (3, 4), valid: Tensor | None = None
) -> None:
    codes, ids = tiny.codes(BATCH, *grid), tiny.classes(BATCH)
    plan = model.make_plan(plan_name, *grid)
    plain, chunked = plain_loss(model, codes, ids, plan_name, valid), model.loss(codes, ids, plan, valid)
    for key, value in plain.items():
        torch.testing.assert_close(chunked[key], value.to(chunked[key]), atol=1e-12, rtol=1e-12, check_dtype=False)
    ours, reference = gradients(model, chunked["loss"]), gradients(model, plain["loss"])
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, atol=1e-12, rtol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    assert any(value.any() for value in reference.values())


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("plan", ["diagonal", "raster"])
@pytest.mark.parametrize("corner", ["horizontal", "fused"])
@pytest.mark.parametrize("fusion", ["gate", "logit_gate", "average"])
def test_loss_and_gradients(fusion: str, corner: str, plan: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 leave a remainder in every group of targets (interior, first row, first column)."""
    for module in (losses, dual_head):
        monkeypatch.setattr(module, "chunk_size", lambda *_: chunk)
    assert_equal_losses(tiny.flashar(fusion=fusion, corner=corner).double(), plan)


@pytest.mark.parametrize("valid", [[True, False, True], [False, False, True], [False, False, False]])
@pytest.mark.parametrize("plan", ["diagonal", "raster"])
def test_samples_that_are_not_valid_get_no_gradient(plan: str, valid: list[bool]) -> None:
    model, mask = tiny.flashar().double(), torch.tensor(valid)
    if any(valid):
        assert_equal_losses(model, plan, valid=mask)
    else:  # a rank whose share of a last batch is padding only
        loss = model.loss(tiny.codes(BATCH, 3, 4), tiny.classes(BATCH), model.make_plan(plan, 3, 4), mask)["loss"]
        assert loss.detach() == 0
        assert not any(value.any() for value in gradients(model, loss).values())


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("corner", ["horizontal", "fused"])
def test_grids_without_an_interior(grid: tuple[int, int], corner: str) -> None:
    """L_H or L_V of a single column or row has no target and is 0, not NaN."""
    assert_equal_losses(tiny.flashar(corner=corner).double(), "diagonal", grid)
    result = tiny.flashar(corner=corner).loss(tiny.codes(2, *grid), tiny.classes(2))
    assert (result["horizontal"] == 0) == (grid[1] == 1)
    assert (result["vertical"] == 0) == (grid[0] == 1)


def test_raster_model() -> None:
    assert_equal_losses(RasterAR(tiny.backbone()).double(), "raster")


def test_frozen_heads_get_no_gradient() -> None:
    """Stage 1 freezes the backbone and the horizontal head; the rest must be as if they were not frozen."""
    model = tiny.flashar().double()
    codes, ids = tiny.codes(BATCH, 3, 4), tiny.classes(BATCH)
    full = gradients(model, model.loss(codes, ids)["loss"])
    for name, role in model.roles().items():
        if role in ("backbone", "horizontal_head"):
            model.get_parameter(name).requires_grad_(False)
    model.loss(codes, ids)["loss"].backward()
    for name, role in model.roles().items():
        gradient = model.get_parameter(name).grad
        if role in ("backbone", "horizontal_head"):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, full[name], atol=1e-12, rtol=1e-10)


def test_auxiliary_weight() -> None:
    model, codes, ids = tiny.flashar(), tiny.codes(2, 3, 4), tiny.classes(2)
    parts = model.loss(codes, ids)
    total = parts["fused"] + 0.05 * (parts["horizontal"] + parts["vertical"])
    torch.testing.assert_close(parts["loss"].detach(), total)
    torch.testing.assert_close(model.loss(codes, ids, aux_weight=0.0)["loss"].detach(), parts["fused"])
    assert [key for key, value in parts.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("make", [tiny.flashar, lambda: RasterAR(tiny.backbone())])
def test_bfloat16_autocast_is_close_to_float32(make: object) -> None:
    model: GridModel = make()  # type: ignore[operator]
    codes, ids = tiny.codes(4, 3, 4), tiny.classes(4)
    exact = model.loss(codes, ids)
    exact["loss"].backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(codes, ids)
    mixed["loss"].backward()
    assert mixed["loss"].dtype == mixed["nll"].dtype == mixed["gate"].dtype == torch.float32
    torch.testing.assert_close(mixed["loss"], exact["loss"], atol=0.05, rtol=0.02)
    for name, expected in reference.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype == torch.float32, "master weights have float32 gradients"
        cosine = F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98, (name, float(cosine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision_losses_are_float32(dtype: torch.dtype) -> None:
    model, codes, ids = tiny.flashar(), tiny.codes(4, 3, 4), tiny.classes(4)
    exact = model.loss(codes, ids)["loss"].detach()
    result = model.to(dtype).loss(codes, ids)
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"].detach(), exact, atol=0.1, rtol=0.03)
    result["loss"].backward()
    for name, parameter in model.named_parameters():
        if "code_embedding" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all()


def test_large_logits_stay_finite() -> None:
    """exp of a logit of 200 overflows float32; log-sum-exp must be taken after subtracting the maximum."""
    model = tiny.flashar()
    with torch.no_grad():
        model.dual_head.horizontal.weight.mul_(100)
    loss = model.loss(tiny.codes(2, 3, 4), tiny.classes(2))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_second_backward_is_refused() -> None:
    """The gradients are handed out once: scaled in place, a second pass would get them wrong without a word."""
    loss = FlashAR(tiny.backbone(), 1).loss(tiny.codes(2, 3, 3), tiny.classes(2))["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize("make", [tiny.flashar, lambda: RasterAR(tiny.backbone())])
def test_the_gradient_follows_what_is_done_with_the_loss(make: object) -> None:
    """The gradients are computed before the loss is scaled by a caller, such as gradient accumulation."""
    model: GridModel = make().double()  # type: ignore[operator]
    codes, ids = tiny.codes(2, 3, 4), tiny.classes(2)
    once = gradients(model, model.loss(codes, ids)["loss"])
    loss = model.loss(codes, ids)["loss"]
    scaled = gradients(model, -3 * loss + loss * loss.detach())
    for name, value in once.items():
        torch.testing.assert_close(scaled[name], (float(loss.detach()) - 3) * value, atol=1e-12, rtol=1e-10)


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation must not pay for the gradients of the heads."""
    model, codes, ids = tiny.flashar(), tiny.codes(2, 3, 4), tiny.classes(2)
    monkeypatch.delattr(losses, "_error_")
    with torch.no_grad():
        assert not model.loss(codes, ids)["loss"].requires_grad
    with pytest.raises(NameError, match="_error_"):
        model.loss(codes, ids)


def test_float16_errors_do_not_underflow() -> None:
    """An error of one target of many, divided by their number before the cast to float16, would be 0."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 8), (0.01 * torch.randn(5000, 8)).requires_grad_()
    labels = torch.randint(0, 5000, (64,))
    total, _ = losses.head_nll(losses.HeadInputs(x.half().requires_grad_(), weight, labels, torch.ones(64)))
    (gradient,) = torch.autograd.grad(total / 1e6, weight)
    (expected,) = torch.autograd.grad(F.cross_entropy(x @ weight.t(), labels, reduction="sum") / 1e6, weight)
    untouched = torch.ones(5000, dtype=torch.bool)
    untouched[labels] = False
    torch.testing.assert_close(gradient[untouched], expected[untouched], rtol=0.05, atol=1e-12)


def test_chunks_are_a_sixteenth_within_their_limits() -> None:
    """Other sizes give the same losses, slower or in more memory."""
    vocabulary = 1000
    sizes = [losses.chunk_size(targets, vocabulary, "cpu") for targets in (500, 2000, 32_000, 10**6)]
    assert sizes == [500, 2**20 // vocabulary, 2000, 2**22 // vocabulary]


def test_weights_of_both_auxiliary_losses_can_differ() -> None:
    """L_fuse + w_h L_H + w_v L_V; the authors' code has (0, 0.05)."""
    model = tiny.flashar().double()
    codes, ids = torch.randint(0, model.backbone.vocabulary, (2, 3, 4)), torch.tensor([1, 2])
    parts = model.eval().loss(codes, ids, aux_weight=(0.0, 0.05))
    torch.testing.assert_close(parts["loss"].detach(), parts["fused"] + 0.05 * parts["vertical"])
    both = model.loss(codes, ids, aux_weight=(0.3, 0.3))["loss"]
    assert torch.equal(both, model.loss(codes, ids, aux_weight=0.3)["loss"])


def plain_distillation(model: GridModel, codes: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || vertical head) over rows below the first, from all logits at once."""
    height, width = codes.shape[1:]
    with torch.no_grad():
        teacher = model(codes, ids, raster_plan(height, width)).fused[:, 1:]
    student = model(codes, ids, diagonal_plan(height, width)).vertical[:, :-1]
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1).mean()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("corner", ["horizontal", "fused"])
def test_distillation(corner: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients; a teacher that learns, the wrong source cell and a lost T^2 would differ."""
    monkeypatch.setattr(losses, "chunk_size", lambda *_: 5)
    model = tiny.flashar(corner=corner).double()
    model.backbone.requires_grad_(not frozen)
    model.dual_head.horizontal.requires_grad_(not frozen)
    codes, ids = tiny.codes(BATCH, 3, 4), tiny.classes(BATCH)
    off, on = (model.loss(codes, ids, distillation=w, temperature=3.0)["loss"] for w in (0.0, 0.2))
    plain = 0.2 * plain_distillation(model, codes, ids, 3.0)
    assert plain > 1e-6
    torch.testing.assert_close(on - off, plain, atol=1e-12, rtol=1e-10)
    trained = [each for each in model.parameters() if each.requires_grad]
    grads = [torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True) for loss in (off, on, plain)]
    for without, with_it, reference in zip(*grads, strict=True):
        torch.testing.assert_close(with_it - without, reference, atol=1e-12, rtol=1e-8)


def test_distillation_drops_the_same_conditions_and_no_bit_of_the_rest() -> None:
    """Guards a teacher with a condition where the student has none, and one that moves the student's random numbers."""
    model, seen = tiny.flashar(condition_dropout=0.5).double().train(), []
    codes, ids = tiny.codes(16, 3, 4), tiny.classes(16)
    drop = model.backbone._drop_condition
    model.backbone._drop_condition = lambda *given: seen.append(drop(*given)) or seen[-1]
    results = []
    for options in ({}, {"distillation": 0.0}, {"distillation": 0.2}):
        torch.manual_seed(0)
        results.append(model.loss(codes, ids, **options))
    assert torch.equal(results[0]["loss"], results[1]["loss"])
    assert torch.equal(results[0]["nll"], results[2]["nll"])
    assert len(seen) == 4
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], ids)
