"""Filters, drawing and seeds against their definitions and the official filter."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import llamagen_golden

from flashar_pl.numerics import sample_seeds, uniforms
from flashar_pl.sampling import (
    SamplingSettings,
    check_usable,
    choose,
    draw,
    filter_logits,
    guide,
    probabilities,
    unusable,
)

OFFICIAL = [  # temperature, top_k, top_p of out/probs_0, 1, ...
    (1.0, 0, 1.0),
    (1.0, 1, 1.0),
    (0.7, 10, 1.0),
    (1.0, 0, 0.9),
    (1.3, 20, 0.8),
    (1.0, 5, 0.3),
    (1.0, 200, 1.0),
    (1e-9, 0, 1.0),
]


@pytest.mark.parametrize("index", range(len(OFFICIAL)))
def test_filter_equals_the_official_one(index: int) -> None:
    """Row 1 has a tie at the top: top-k keeps both, and top-p is applied to what top-k left."""
    _, arrays = llamagen_golden("sampling_filter")
    mine = probabilities(arrays["in/logits"], *OFFICIAL[index])
    official = arrays[f"out/probs_{index}"]
    assert torch.equal(mine > 0, official > 0), "kept sets are exact"
    torch.testing.assert_close(mine, official, atol=1e-6, rtol=0)


def test_filters_by_definition() -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    for row in logits:
        order = row.argsort(descending=True).tolist()
        assert set(_kept(row, top_k=4)) == set(order[:4])
        p, kept, total = row.double().softmax(-1), [], 0.0
        for code in order:
            kept.append(code)
            total += float(p[code])
            if total > 0.7:
                break
        assert set(_kept(row, top_p=0.7)) == set(kept)


def _kept(row: torch.Tensor, **settings: float) -> list[int]:
    return filter_logits(row, **settings).isfinite().nonzero().flatten().tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.25, 2), (0.3, 2), (0.5, 3), (0.75, 4), (0.8, 4)])
def test_top_p_at_an_exact_tie(top_p: float, kept: int) -> None:
    """Four codes of exactly a quarter each: one before which the sum is p itself stays, as in the official filter."""
    assert _kept(torch.tensor([1.0, 1.0, -torch.inf, 1.0, 1.0]), top_p=top_p) == [0, 1, 3, 4][:kept]


def test_filters_leave_their_input_alone() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    probabilities(logits, 0.5, 3, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_are_float32_and_sum_to_one(dtype: torch.dtype) -> None:
    p = probabilities(torch.randn(4, 3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype), 1.0, 100, 0.9)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 3))


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=9).filter(lambda weights: sum(weights) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_is_the_first_code_beyond_the_threshold(weights: list[float], u: float) -> None:
    cdf = list(np.cumsum(np.asarray(weights, dtype=np.float64)))
    expected = next((k for k, value in enumerate(cdf) if value > u * cdf[-1]), len(weights) - 1)
    drawn = draw(torch.tensor([weights]), torch.tensor([u], dtype=torch.float64))
    assert drawn.tolist() == [expected]


def test_draw_at_the_edges_of_the_cdf() -> None:
    """A code of weight 0 is never drawn, at u = 0 and at the largest u included."""
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0])
    u = torch.tensor([0.0, 0.25 - 2**-54, 0.25, 0.75 - 2**-53, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.expand(6, 7), u).tolist() == [1, 1, 3, 3, 4, 4]
    unnormalised = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0)) * 3
    unnormalised[:, -1] = 0
    largest = torch.full((2000,), 1 - 2**-53, dtype=torch.float64)
    assert int(draw(unnormalised, largest).max()) == 3


def test_draw_follows_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.29, 0.01])
    n = 40_000
    drawn = draw(p.expand(n, 5), torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(drawn, minlength=5) / n
    assert ((counts - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_the_cdf_is_float64() -> None:
    """Just below an edge the code before it is drawn, just above it the code after; float32 cannot tell."""
    p = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    cdf = p.double().cumsum(-1)
    edges = torch.arange(100, 4900, 100)
    for side, expected in ((-1e-11, edges), (1e-11, edges + 1)):
        u = cdf[edges] / cdf[-1] * (1 + side)
        assert torch.equal(draw(p.expand(len(edges), -1), u), expected)


def test_ties_share_the_probability_and_greedy_takes_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    half = probabilities(logits, top_k=1)
    assert half.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    u = torch.tensor([0.9], dtype=torch.float64)
    assert choose(logits, u, SamplingSettings(top_k=1)).tolist() == [2]
    assert choose(logits, u, SamplingSettings(greedy=True)).tolist() == [1]
    assert choose(logits, u, SamplingSettings(temperature=0.0)).tolist() == [2]


def test_guidance() -> None:
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    assert guide(c, u, 3.0).tolist() == [2.0, -2.0]
    assert torch.equal(guide(c, u, 0.0), u)
    settings = SamplingSettings(cfg_scale=2.0, cfg_interval=3)
    assert [settings.guides(n) for n in range(7)] == [True] * 5 + [False] * 2
    assert SamplingSettings(cfg_scale=2.0).guides(10_000)
    assert SamplingSettings(cfg_scale=0.0).guided
    assert not SamplingSettings(cfg_scale=1.0, cfg_interval=3).guides(0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cfg_scale", -0.5),
        ("cfg_scale", math.nan),
        ("cfg_scale", 1e308),
        ("temperature", 10**30),
        ("cfg_interval", -1),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}; expected")):
        SamplingSettings(**{name: value})
    if name in ("temperature", "top_k", "top_p"):
        with pytest.raises(ValueError, match=name):
            probabilities(torch.zeros(2, 3), **{name: value})


def test_seeds_of_a_batch() -> None:
    assert sample_seeds(7, 3) == sample_seeds(np.int64(7), 3) == sample_seeds(torch.tensor(7), 3) == [7, 8, 9]  # type: ignore[arg-type]
    assert sample_seeds([5, 1], 2) == sample_seeds(torch.tensor([5, 1]), 2) == [5, 1]
    with pytest.raises(ValueError, match="seeds has 2 entries; expected one int or 3 entries"):
        sample_seeds([1, 2], 3)
    for wrong in (1.5, [1.0, 2.0], torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"seeds is .*; expected one int or 2 ints"):
            sample_seeds(wrong, 2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    first = sample_seeds(None, 4)
    assert len(set(first)) == 4
    assert sample_seeds(None, 4) != first
    torch.manual_seed(0)
    assert sample_seeds(None, 4) == first


def test_uniforms_belong_to_the_sample_not_to_the_batch() -> None:
    together = uniforms([3, 4, 5], 10)
    assert together.dtype == torch.float64
    for row, seed in zip(together, (3, 4, 5)):
        alone = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row, alone)
    state = torch.get_rng_state()
    uniforms([1], 5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_cannot_be_drawn_from_are_found(value: float) -> None:
    """Guards images drawn silently from NaN: one row of many is enough, and a single code at -inf is no error."""
    logits = torch.randn(2, 3, 7)
    logits[0, 1, 2] = -math.inf
    assert not unusable(logits)
    logits[1, 2] = value
    flags = torch.stack([torch.tensor(False), unusable(logits)])
    with pytest.raises(ValueError, match=r"step 1 are NaN or infinite in float16; .* bf16"):
        check_usable(flags, torch.float16)
    for dtype, advice in ((torch.float32, "the weights are broken"), (torch.bfloat16, "try --dtype fp32")):
        with pytest.raises(ValueError, match=advice):
            check_usable(flags, dtype)
    check_usable(flags[:1], torch.float16)
    codes = choose(logits, torch.full((2, 3), 0.9, dtype=torch.float64), SamplingSettings(top_k=3))
    assert int(codes.max()) < 7, "a legal code all the same: an index beyond the table would end the process on a GPU"
