"""Products of bytes with bytes: what is rounded, which sums, which devices."""

from typing import Any

import pytest
import torch

from flashar_pl.layers import rounded
from flashar_pl.layers.byte_products import byte_product, exact_on_this_processor, multiplies
from flashar_pl.layers.rounded import BYTES, RoundedLinear

needs_exact = pytest.mark.skipif(not exact_on_this_processor(), reason="a processor without VNNI")


def made(rounding: Any, n: int = 32, k: int = 48) -> RoundedLinear:
    torch.manual_seed(0)
    return RoundedLinear(torch.randn(n, k) * torch.logspace(-2, 1, n)[:, None], torch.randn(n), rounding)


@pytest.mark.parametrize("rounding", [pytest.param("int8", marks=needs_exact), "fp8"])
def test_both_sides_are_rounded_row_by_row(rounding: Any) -> None:
    """Against float64 with the bytes spelled out: a scale of a wrong row or side is far off."""
    layer, (kind, most) = made(rounding), BYTES[rounding]
    x = torch.randn(3, 7, 48) * torch.logspace(-3, 3, 7)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / most
    p = (x / scale).round().to(kind) if kind == torch.int8 else (x / scale).to(kind)
    want = (p.double() * scale.double()) @ (layer.q.double() * layer.scale.double()[:, None]).T + layer.bias
    got = byte_product(x, layer.q, layer.scale, layer.bias, most)
    tolerance = 1e-6 if kind == torch.int8 else 2**-8  # products of float8 come in bfloat16
    assert ((got - want).abs() <= tolerance * (want.abs().amax(-1, keepdim=True) + 1)).all()


@needs_exact
def test_int8_on_a_processor_multiplies_bytes() -> None:
    """Else its format saves memory and no time; in bfloat16, too, and a row alone is the row among others."""
    layer = made("int8")
    x = torch.randn(5, 48)
    found = layer(x)
    assert torch.equal(found, byte_product(x, layer.q, layer.scale, layer.bias, 127))
    assert torch.equal(layer(x[3:4]), found[3:4])
    half = RoundedLinear(torch.randn(32, 48).bfloat16(), None, "int8")
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_without_exact_sums_weights_are_turned_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without VNNI add two products in 16 bits, which overflows without a word."""
    monkeypatch.setattr(rounded, "exact_on_this_processor", lambda: False)
    layer, x = made("int8"), torch.randn(5, 48)
    weight = layer.q.float() * layer.scale[:, None]
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias))


@needs_exact
def test_rows_of_zeros_and_of_no_numbers() -> None:
    """0 / 0 would make padding NaN, and a NaN must not turn into a number."""
    layer, x = made("int8"), torch.zeros(3, 48)
    x[1, 0], x[2, 0] = float("nan"), float("inf")
    found = layer(x)
    assert torch.equal(found[0], layer.bias)
    assert not found[1:].isfinite().any()


@pytest.mark.parametrize(("rounding", "rows", "capability", "want"), [
    ("int8", 300, (8, 0), True), ("int8", 16, (9, 0), False), ("fp8", 300, (8, 9), False), ("fp8", 1, (9, 0), True),
])  # fmt: skip
def test_what_a_gpu_multiplies(rounding: Any, rows: int, capability: Any, want: bool, monkeypatch: Any) -> None:
    """torch._int_mm refuses 16 rows, and float8 with a scale for each row is of capability 9.0."""

    class OnGpu:
        is_cuda, device, shape = True, torch.device("cuda"), (rows, 48)
        numel = staticmethod(lambda: rows * 48)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x: Any = OnGpu()
    assert multiplies(x, made(rounding).q, exact=False) is want
    assert not multiplies(x, made(rounding, n=33).q, exact=True), "33 outputs are no multiple"


@pytest.mark.slow
def test_a_compiled_block_does_not_try_the_processor_out_in_every_layer() -> None:
    """torch.compile looks through a cache: the graph broke at the question, with a page of warnings."""
    layer, x = made("int8"), torch.randn(5, 48)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
