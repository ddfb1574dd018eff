"""Attention, RoPE, norm and cache against plain formulas."""

import math

import pytest
import torch

from flashar_pl.backbones.condition import Batch
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import Rope, angles_1d, angles_2d, apply_rope, rotations
from flashar_pl.layers.transformer import Attention, Block, BlockConfig, RMSNorm, attention
from flashar_pl.numerics import DTYPES, dtype_from_name

SIZES = {"dim": 16, "n_head": 4, "head_dim": 8, "ffn_dim": 24}


def rope_table(length: int, width: int = 8) -> Rope:
    return rotations(angles_1d(torch.arange(length), width, 10000.0)[None])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_rotates_pairs(interleaved: bool) -> None:
    """The two pairings differ only in which dimensions turn together; mixing them up ruins imported weights."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    y = apply_rope(x, rope_table(5), interleaved)
    for position in range(5):
        for pair in range(4):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            angle = position * 10000.0 ** (-2 * pair / 8)
            a, b = x[:, position, :, i], x[:, position, :, j]
            torch.testing.assert_close(y[:, position, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[:, position, :, j], b * math.cos(angle) + a * math.sin(angle))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rope_keeps_the_dtype_and_rotates_in_full_precision(dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = apply_rope(x, rope_table(4), interleaved)
    assert y.dtype == dtype
    exact = apply_rope(x.double(), rope_table(4), interleaved)
    assert torch.equal(y, exact.to(dtype)) or (y - exact).abs().max() < torch.finfo(dtype).eps * 4


def test_rope_works_on_slices_of_a_joint_projection() -> None:
    """Queries are strided views; a view as complex numbers needs even strides."""
    joint = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    q = joint.unflatten(-1, (5, 8))[:, :, 1:3]
    for interleaved in (True, False):
        whole = apply_rope(q.contiguous(), rope_table(3), interleaved)
        torch.testing.assert_close(apply_rope(q, rope_table(3), interleaved), whole)


def test_a_table_row_of_zeros_zeroes_the_position() -> None:
    rope = rope_table(3).index_fill(1, torch.tensor([1]), 0)
    for interleaved in (True, False):
        y = apply_rope(torch.ones(1, 3, 1, 8), rope, interleaved)
        assert (y[:, 1] == 0).all()
        assert (y[:, 0] == 1).all()


def test_2d_angles_turn_the_first_half_by_row_and_the_second_by_column() -> None:
    angles = angles_2d(torch.tensor([3]), torch.tensor([5]), 8, 100.0)[0]
    assert angles.tolist() == pytest.approx([3.0, 0.3, 5.0, 0.5])
    with pytest.raises(AssertionError, match="turn in pairs"):
        angles_2d(torch.tensor([0]), torch.tensor([0]), 6, 100.0)


def test_rms_norm_sums_in_float32() -> None:
    """A mean square over many bfloat16 values loses its small terms."""
    norm = RMSNorm(4096, 1e-5)
    x = torch.full((1, 4096), 1.0)
    x[0, 0] = 300.0
    expected = x / (x.square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm.bfloat16()(x.bfloat16()), expected.bfloat16())


def attend(attention: Attention, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None) -> torch.Tensor:
    return attention.output(attention.attend(*attention.project(x, rope), mask, None, 0))


def test_grouped_queries_equal_repeated_keys() -> None:
    """Query head h uses key/value head h // (A / G)."""
    torch.manual_seed(0)
    grouped = Attention(BlockConfig(**SIZES, n_kv_head=2))
    full = Attention(BlockConfig(**SIZES, n_kv_head=4))
    q, k, v = grouped.wqkv.weight.detach().split([32, 16, 16])
    repeated = [part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
    full.wqkv.weight.data = torch.cat([q, *repeated])
    full.wo.weight.data = grouped.wo.weight.detach()
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        attend(grouped, x, rope_table(5), mask), attend(full, x, rope_table(5), mask), atol=1e-6, rtol=1e-5
    )


def test_attention_by_definition() -> None:
    torch.manual_seed(0)
    attention = Attention(BlockConfig(**SIZES, n_kv_head=4, qk_norm=True, rope_interleaved=False))
    x, rope = torch.randn(1, 4, 16), rope_table(4)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    q, k, v = (part.unflatten(-1, (4, 8)) for part in attention.wqkv(x).chunk(3, dim=-1))
    q, k = (apply_rope(norm(part), rope, False) for norm, part in ((attention.q_norm, q), (attention.k_norm, k)))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = attention.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attend(attention, x, rope, mask), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_cached_positions_equal_a_full_pass(n_kv_head: int) -> None:
    torch.manual_seed(0)
    block = Block(BlockConfig(**SIZES, n_kv_head=n_kv_head)).eval()
    x, rope = torch.randn(2, 6, 16), rope_table(6)
    steps = [(0, 1), (1, 3), (3, 6)]
    group = torch.cat([torch.full((end - begin,), i) for i, (begin, end) in enumerate(steps)])
    full = block(x, rope, group[:, None] >= group[None, :])
    cache = KVCache(CacheSpec(1, n_kv_head, 8), 2, 6, torch.float32, "cpu")
    parts = []
    for begin, end in steps:
        parts.append(block(x[:, begin:end], rope[:, begin:end], None, cache, 0))
        cache.advance(end - begin)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-6, rtol=1e-5)


def test_layers_of_one_forward_append_at_the_same_place() -> None:
    cache = KVCache(CacheSpec(2, 1, 4), 3, 5, torch.float32, "cpu")
    first, second = torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4)
    for layer in range(2):
        keys, values = cache.append(layer, first + layer, second + layer)
        assert torch.equal(keys, first + layer)
        assert torch.equal(values, second + layer)
    cache.advance(2)
    keys, _ = cache.append(1, second, first)
    assert torch.equal(keys, torch.cat([first + 1, second], 2))
    cache.advance(2)
    cache.keep_rows(2)
    keys, _ = cache.append(1, first[:2, :, :1], first[:2, :, :1])
    assert torch.equal(keys[:, :, :4], torch.cat([first + 1, second], 2)[:2])
    with pytest.raises(AssertionError, match="cache holds 5 positions, 6 are needed"):
        cache.append(0, first[:2], first[:2])


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="n_head 4 is not a multiple of n_kv_head 3"):
        BlockConfig(**SIZES, n_kv_head=3)
    assert dtype_from_name("bf16") is torch.bfloat16
    with pytest.raises(ValueError, match=f"int8.*{', '.join(DTYPES)}"):
        dtype_from_name("int8")


@pytest.mark.parametrize("mask", ["one", "by row", "by key", "causal", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_is_attention_with_repeated_keys(groups: int, mask: str | None) -> None:
    """Queries that share a key are rows of one head: a mask in the wrong order would let them look ahead."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 12, dtype=torch.float64, generator=random)
    k, v = (torch.randn(2, groups, 5, 12, dtype=torch.float64, generator=random) for _ in "kv")
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    rows = torch.rand(2, 1, 5, 5, generator=random) < 0.5
    given = {
        "one": causal[None, None], "by row": rows | torch.eye(5, dtype=torch.bool), "causal": "causal",
        "by key": torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()[:, None, None], None: None,
    }[mask]  # fmt: skip
    seen = causal if mask == "causal" else torch.ones(1, dtype=torch.bool) if given is None else given
    each = [part.repeat_interleave(4 // groups, 1) for part in (k, v)]
    scores = (q @ each[0].mT / 12**0.5).masked_fill(~seen, -torch.inf)  # type: ignore[operator]
    expected = (scores.softmax(-1) @ each[1]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(q, k, v, given), expected)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 100), (8, 2, 128), (4, 4, 64)])
def test_masked_attention_runs_in_a_fused_kernel(heads: int, groups: int, width: int) -> None:
    """LlamaGen-3B has heads of 100, Emu3.5 shares keys: without care all probabilities are written to memory."""
    q = torch.randn(2, heads, 33, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2, groups, 33, width, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    mask = torch.ones(33, 33, dtype=torch.bool, device="cuda").tril()[None, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        y = attention(q, k, v, mask)
        y.sum().backward()
    expected = attention(q.detach().cpu().float(), k.cpu().float(), v.cpu().float(), mask.cpu())
    torch.testing.assert_close(y.detach().cpu().float(), expected, atol=2e-2, rtol=2e-2)


def test_a_batch_goes_to_a_gpu_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards copies from pageable memory, three a step, each of which waits for all that the GPU has to do."""
    asked: list[object] = []
    batch = Batch(torch.zeros(2, 3, 4, dtype=torch.int64), torch.arange(2))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking=False: asked.append((device, non_blocking)) or tensor
    )
    batch.to("cuda")
    assert asked == ["pinned", ("cuda", True)] * 2
    asked.clear()
    batch.to("cpu")
    assert asked == [("cpu", False)] * 2
