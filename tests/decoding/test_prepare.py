"""Copies of a model with weights in another form: equal codes, untouched originals, errors that say what to do."""

import weakref
from typing import Any

import pytest
import tiny
import torch
from pretend_gpu import PretendGPU

from flashar_pl.decoding import Engine, generate
from flashar_pl.decoding import prepare as preparing
from flashar_pl.decoding.prepare import prepare
from flashar_pl.layers import rounded
from flashar_pl.layers.packed import unsupported
from flashar_pl.layers.rounded import RoundedLinear
from flashar_pl.models import FlashAR
from flashar_pl.models.base import GridModel

needs_packing = pytest.mark.skipif(unsupported(torch.float32) is not None, reason="torch without oneDNN")
QUANTISED = ["int8", "fp8"]
EVERY = [pytest.param("packed", marks=needs_packing), *QUANTISED]


def prompts(batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Prompts of unequal length, and what guidance leads away from."""
    lengths = [5, 7, 6][:batch]
    return [torch.arange(1, 1 + n) for n in lengths], [torch.arange(2, 5) for _ in lengths]


def tame(model: torch.nn.Module, kind: str) -> None:
    """Smaller weights where they are made large: rounding would grow through them from layer to layer."""
    if kind == "emu":
        for parameter in model.parameters():
            parameter.data.mul_(0.25)


def inputs(kind: str, batch: int) -> tuple[GridModel, Any, Any]:
    """A model, a condition and the unconditional one."""
    if kind == "llamagen":
        return tiny.flashar(), tiny.classes(batch), None
    condition, unconditional = prompts(batch)
    return tiny.emu_flashar(), condition, unconditional


@needs_packing
@pytest.mark.parametrize("kind", ["llamagen", "emu"])
@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_weights_give_the_same_codes(kind: str, plan: str, cfg_scale: float, batch: int) -> None:
    """Guards the layout, the rows of the heads that are kept, and the vertical branch."""
    model, condition, unconditional = inputs(kind, batch)
    tame(model, kind)
    settings: dict[str, Any] = {"cfg_scale": cfg_scale, "seeds": 3}
    if cfg_scale != 1:
        settings["unconditional"] = unconditional
    expected = generate(model, condition, (4, 5), plan, **settings)
    assert torch.equal(generate(prepare(model, "packed"), condition, (4, 5), plan, **settings), expected)


@needs_packing
@pytest.mark.parametrize("kind", ["llamagen", "emu"])
def test_packed_logits(kind: str) -> None:
    """Guards every projection: logits of all cells agree."""
    model, condition, _ = inputs(kind, 2)
    tame(model, kind)
    codes = tiny.codes(2, 4, 5)
    with torch.no_grad():
        expected, found = model(codes, condition), prepare(model, "packed")(codes, condition)
    scale = float(expected.fused.abs().max())
    for name in ("fused", "horizontal", "vertical", "gate"):
        difference = (getattr(found, name) - getattr(expected, name)).abs().max()
        assert difference < 1e-4 * max(1.0, scale), name  # a wrong projection is as large as 1


@pytest.mark.parametrize("weights", EVERY)
def test_the_model_is_left_as_it_was_and_shares_nothing(weights: str) -> None:
    """Guards training: it must neither be changed by the copy nor change it."""
    model, condition, _ = inputs("llamagen", 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    made = prepare(model, weights)
    codes = tiny.codes(2, 4, 5)
    with torch.no_grad():
        first = made(codes, condition).fused
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.loss(codes, condition)["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(made(codes, condition).fused, first)
        assert not torch.equal(model(codes, condition).fused, first)


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("kind", ["llamagen", "emu"])
def test_quantised_logits_are_near(weights: str, kind: str) -> None:
    """Guards scales and rows: a wrong row or scale is far off; exact equality would mean that nothing was quantised."""
    model, condition, unconditional = inputs(kind, 2)
    tame(model, kind)
    made = prepare(model, weights)
    codes = tiny.codes(2, 4, 5)
    with torch.no_grad():
        expected, found = model(codes, condition).fused, made(codes, condition).fused
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {"int8": 0.1, "fp8": 0.4}[weights]
    drawn = generate(made, condition, (4, 5), "diagonal", cfg_scale=2.0, seeds=0, unconditional=unconditional)
    assert drawn.shape == (2, 4, 5)
    block = made.backbone.blocks[0]
    assert block.attention.wo.q.element_size() == 1  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("weights", QUANTISED)
def test_an_output_without_weights_stays_zero(weights: str) -> None:
    """LlamaGen's head starts at zero, and codes that no image has may stay there; 0 / 0 would make them NaN."""
    model, condition, _ = inputs("llamagen", 2)
    with torch.no_grad():
        model.dual_head.horizontal.weight[3:5] = 0
        model.backbone.blocks[0].attention.wo.weight.zero_()  # type: ignore[union-attr,operator]
        logits = prepare(model, weights)(tiny.codes(2, 4, 5), condition).horizontal
    assert logits.isfinite().all()
    assert (logits[..., 3:5] == 0).all()
    assert (logits[..., 5] != 0).any()


def test_the_gate_stays_in_float32() -> None:
    """Guards Eq. 7: only projections of the blocks and the heads are quantised."""
    model = tiny.flashar()
    made = prepare(model, "int8")
    assert isinstance(model, FlashAR)
    assert isinstance(made, FlashAR)
    assert torch.equal(made.dual_head.gate.hidden.weight, model.dual_head.gate.hidden.weight)  # type: ignore[union-attr]
    assert torch.equal(made.backbone.code_embedding.weight, model.backbone.code_embedding.weight)  # type: ignore[operator]


@needs_packing
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("plan", ["raster", "diagonal"])
def test_sixteen_bits(name: str, plan: str) -> None:
    """Guards fp16 and bf16 decoding on a CPU, plain and packed: every code is legal, logits are near float32's."""
    dtype = getattr(torch, name)
    model, condition, _ = inputs("llamagen", 2)
    codes = tiny.codes(2, 4, 5)
    with torch.no_grad():
        expected = model(codes, condition).fused
        model.to(dtype)
        variants = [model] if unsupported(dtype) else [model, prepare(model, "packed")]
        for made in variants:
            error = float((made(codes, condition).fused - expected).norm() / expected.norm())
            assert 0 < error < 0.05
            drawn = generate(made, condition, (4, 5), plan, cfg_scale=2.0, seeds=0)
            assert int(drawn.min()) >= 0
            assert int(drawn.max()) < tiny.VOCABULARY


def test_packed_needs_a_processor() -> None:
    """Guards a GPU model against an obscure error inside oneDNN."""
    with pytest.raises(ValueError, match="use plain"):
        prepare(tiny.flashar().to("meta"), "packed")


@needs_packing
def test_packed_weights_are_not_compiled() -> None:
    """torch 2.13 fails on them inside its code generator, with a page of internals."""
    with pytest.raises(ValueError, match=r"runner is compiled, and the weights are packed, .* use eager"):
        Engine(prepare(tiny.flashar(), "packed"), "compiled")


@pytest.mark.parametrize("weights", QUANTISED)
def test_rounded_weights_are_the_nearest(weights: Any) -> None:
    """Guards the scale, one for each output: a weight is off by half a step of its own at most."""
    weight = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    made = RoundedLinear(weight, None, weights)
    error = (made.q.double() * made.scale.double()[:, None] - weight.double()).abs()
    step = made.scale.double()[:, None]
    if weights == "fp8":  # 3 bits after the first; below 2^-6 the steps stay equal
        step = step * 2 ** (made.q.double().abs().clamp_min(2**-6).log2().floor() - 3)
    assert (error <= 0.5001 * step).all()
    assert made.q.double().abs().amax(1).tolist() == [{"int8": 127, "fp8": 448}[weights]] * 6


@pytest.mark.parametrize("weights", QUANTISED)
def test_a_device_never_holds_the_weights_in_both_forms(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 34B model fits a card of 80 GB as it is or rounded, and not as both."""
    model = tiny.flashar()
    moves: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    real_move, real_init = preparing.moved, RoundedLinear.__init__

    def move(*given: Any) -> torch.Tensor:
        tensor = real_move(*given)
        moves.append(weakref.ref(tensor))
        return tensor

    def init(self: RoundedLinear, *given: Any) -> None:
        assert model.device.type == "cpu"
        held.append(sum(move() is not None for move in moves))
        real_init(self, *given)

    monkeypatch.setattr(preparing, "moved", move)
    monkeypatch.setattr(RoundedLinear, "__init__", init)
    with PretendGPU(visible=True):
        made = prepare(model, weights, torch.device("cuda"))
        assert all(tensor.is_cuda for tensor in (*made.parameters(), *made.buffers()))
    assert held == [1] * (4 * (len(list(model.backbone.blocks)) + 1) + 2)


def test_the_kernel_has_few_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows would read the weights again and again; nothing but a GPU runs the kernel."""
    made, rows = RoundedLinear(torch.randn(3, 8), None, "int8"), []
    monkeypatch.setattr(rounded, "why_not", lambda device: None)

    def product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(x.numel() // 8)
        return x.new_zeros(*x.shape[:-1], 3)

    monkeypatch.setattr(rounded, "rounded_product", product)
    made(torch.randn(2, 8))
    with PretendGPU():
        made.to("cuda")
        for shape in ((2, 3, 8), (256, 8), (257, 8)):
            assert made(torch.randn(shape).to("cuda")).shape == (*shape[:-1], 3)
    assert rows == [6, 256]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", QUANTISED)
def test_rounded_products_on_a_gpu(weights: Any) -> None:
    """The kernel of few rows and the product of many, which rounds activations, too, against float64."""
    made = RoundedLinear(torch.randn(208, 384).bfloat16(), torch.randn(208).bfloat16(), weights)
    for rows in (1, 40, 300):
        x = torch.randn(rows, 384).bfloat16()
        seen = x.double()
        if rows > rounded.MOST_ROWS and rounded.multiplies(x.cuda(), made.q, made.exact):
            step = x.float().abs().amax(1, keepdim=True) / made.most
            p = x.float() / step
            seen = (p.round() if weights == "int8" else p.to(made.q.dtype)).double() * step
        want = seen @ (made.q.double() * made.scale.double()[:, None]).T + made.bias
        assert (made.cuda()(x.cuda()).cpu() - want).abs().max() <= 1e-2 * want.abs().max()
        made.cpu()
