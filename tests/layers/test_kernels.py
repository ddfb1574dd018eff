"""The kernels of runner fused, on the CPU by Triton's interpreter, against float64 and against the sampler."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from flashar_pl.layers.kernels import block as kernels
from flashar_pl.layers.kernels import heads
from flashar_pl.layers.kernels.launch import launch, watched
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import rotations
from flashar_pl.layers.rounded import RoundedLinear, rounded_product
from flashar_pl.layers.transformer import Block, BlockConfig
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import choose

CONFIGS = {
    "llamagen": BlockConfig(16, 2, 2, 8, 24),
    "emu": BlockConfig(20, 4, 2, 12, 40, 1e-6, qk_norm="rms", rope_interleaved=False),
    "biases": BlockConfig(16, 4, 1, 8, 24, qk_norm="layer", rope_interleaved=False, qkv_bias=True, output_bias=True,
                          ffn_bias=True),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def run_block(
    block: Block, x: Tensor, rope: Tensor, cache: KVCache, first: Tensor, splits: int, causal: bool
) -> Tensor:
    """The five launches on x (R, n, D), with `cache.filled` positions before them."""
    config, (rows, n, width) = block.attention.config, x.shape
    wide = {"ACC": tl.float32}
    attention, ffn = block.attention, block.feed_forward
    places, now = torch.tensor([[9, 9], [0, cache.filled]], dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
    x = x.reshape(rows * n, width)
    q, middle = x.new_empty(len(x), config.n_head * config.head_dim), x.new_empty(len(x), config.ffn_dim)
    y, out, keys, values = torch.empty_like(q), torch.empty_like(x), cache.keys[0], cache.values[0]
    norms = [getattr(norm, name, x) for norm in (attention.q_norm, attention.k_norm) for name in ("weight", "bias")]

    def bias(linear: torch.nn.Linear) -> Tensor:
        return x if linear.bias is None else linear.bias

    heads_, half = config.n_head + 2 * config.n_kv_head, config.head_dim // 2
    pairs = 16 if config.qk_norm != "none" else 2  # several programs a head where that is allowed
    launch(kernels.norm_qkv, (heads_ * -(-half // pairs), 1), x, block.attention_norm.weight, attention.wqkv.weight,
           bias(attention.wqkv), *norms, rope, places, now, q, keys, values, len(x), n, config.norm_eps,
           rope.stride(0) if len(rope) > 1 else 0, keys.stride(0), keys.stride(1), D=width, A=config.n_head,
           G=config.n_kv_head, E=config.head_dim, INTERLEAVED=config.rope_interleaved, QK_NORM=config.qk_norm,
           BIAS=config.qkv_bias, BM=16, BP=pairs, BK=16, **wide)  # fmt: skip
    room = rows * config.n_kv_head
    part, arrived = torch.empty(room * splits * 16, 16), torch.zeros(room, dtype=torch.int32)
    peaks, totals = torch.empty(2, room * splits * 16)
    launch(kernels.attend, (room, splits, 1), q, keys, values, first, places, now, y, part, peaks, totals, arrived, n,
           config.head_dim**-0.5, keys.stride(0), keys.stride(1), A=config.n_head, G=config.n_kv_head,
           E=config.head_dim, EP=16, SPLITS=splits, CAUSAL=causal, BQ=16, BK=4, **wide)  # fmt: skip
    assert not arrived.any(), "the next launch expects zeros"
    launch(kernels.project, (-(-width // 16), 1), y, attention.wo.weight, bias(attention.wo), x, out, len(x), width,
           K=config.n_head * config.head_dim, BIAS=config.output_bias, BM=16, BN=16, BK=16, **wide)  # fmt: skip
    launch(kernels.norm_swiglu, (-(-config.ffn_dim // 16), 1), out, block.ffn_norm.weight, ffn.w13.weight,
           bias(ffn.w13), middle, len(x), config.ffn_dim, config.norm_eps, D=width, BIAS=config.ffn_bias, BM=16, BN=16,
           BK=16, **wide)  # fmt: skip
    launch(kernels.project, (-(-width // 16), 1), middle, ffn.w2.weight, bias(ffn.w2), out, out, len(x), width,
           K=config.ffn_dim, BIAS=config.ffn_bias, BM=16, BN=16, BK=16, **wide)  # fmt: skip
    return out.view(rows, n, width)


@pytest.mark.parametrize(("rounding", "dtype"), [("int8", torch.float16), ("fp8", torch.float32)])
def test_a_product_with_one_byte_a_weight(rounding: Any, dtype: torch.dtype) -> None:
    """Against float64: rows and outputs that fill no tile, a factor for each output, the bias after it."""
    torch.manual_seed(0)
    weight, bias = torch.randn(33, 150) * torch.logspace(-2, 1, 33)[:, None], torch.randn(33)
    made, x = RoundedLinear(weight.to(dtype), bias.to(dtype), rounding), torch.randn(2, 9, 150).to(dtype)
    want = x.double() @ (made.q.double() * made.scale.double()[:, None]).T + bias.to(dtype)
    got = rounded_product(x, made.q, made.scale, made.bias)
    assert got.dtype == dtype
    assert ((got - want).abs().amax((0, 1)) <= TOLERANCE[dtype] * want.abs().amax((0, 1))).all()


def test_a_kernel_starts_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a model on cuda:1 without graphs: Triton would start its kernels on cuda:0, where nothing is."""
    log: list[str] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        log.append("device")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch({(1,): lambda x: log.append("start")}, (1,), torch.zeros(2))
    assert log == ["device", "start", "back"]


@pytest.mark.parametrize(
    ("name", "dtype", "splits", "causal"),
    [
        ("llamagen", torch.float32, 1, False),
        pytest.param("llamagen", torch.float16, 3, True, marks=pytest.mark.slow),
        pytest.param("emu", torch.float32, 3, True, marks=pytest.mark.slow),
        pytest.param("emu", torch.float16, 2, False, marks=pytest.mark.slow),
        pytest.param("biases", torch.float32, 5, False, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_block_of_five_kernels_is_the_block(name: str, dtype: torch.dtype, splits: int, causal: bool) -> None:
    """Against float64: grouped heads, padded widths, norms, rotations, biases, a first key per row, parts of keys."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    block = Block(config).to(dtype).eval()
    for parameter in block.parameters():
        parameter.copy_((parameter.ndim == 1) + 0.3 * torch.randn_like(parameter))
    rows, n, before = 3, 3, 10
    x = torch.randn(rows, n, config.dim).to(dtype)
    first = torch.tensor([0, 7, 3], dtype=torch.int32)
    rope = rotations(torch.randn(rows if splits > 1 else 1, before + n, config.head_dim // 2))
    cache = KVCache(CacheSpec(1, config.n_kv_head, config.head_dim), rows, before + n, dtype, "cpu")
    cache._memory.copy_(torch.randn_like(cache._memory))
    cache._memory[:, :, 1, :, :7] = torch.nan  # what lies before a row's first key must not matter
    wide = KVCache(CacheSpec(1, config.n_kv_head, config.head_dim), rows, before + n, torch.float64, "cpu")
    wide._memory.copy_(cache._memory.nan_to_num(0.0))
    for each in (cache, wide):
        each.restart()
        each.advance(before)
    seen = (torch.arange(before + n) >= first[:, None])[:, None, None].expand(-1, 1, n, -1)
    if causal:
        seen = seen & (torch.arange(before + n) <= before + torch.arange(n)[:, None])
    with watched() as launches:
        got = run_block(block, x, rope, cache, first, splits, causal)
    assert [each.name for each in launches] == ["norm_qkv", "attend", "project", "norm_swiglu", "project"]
    want = block.double()(x.double(), rope[:, before:], seen, wide, 0)
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    written = wide._memory[..., before:, :]
    assert (cache._memory[..., before:, :] - written).abs().max() <= TOLERANCE[dtype] * written.abs().max()


def drawn(z: Tensor, noise: Tensor, settings: SamplingSettings, block: int) -> tuple[Tensor, Tensor]:
    """Codes (C,) of z (C, V) and uniforms (C,), a cell per sample; and the flags of two steps, of which this is 1."""
    cells, vocabulary = z.shape
    codes, fed = torch.empty(cells, 3, dtype=torch.int64), torch.empty(cells, 1, dtype=torch.int64)
    broken, clock = torch.zeros(2, dtype=torch.uint8), torch.tensor(7, dtype=torch.int32)
    places, now = torch.tensor([[0, 0], [2, 0]], dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
    uniforms = torch.stack([torch.zeros(cells), torch.zeros(cells), noise], 1).double()
    launch(heads.choose, (cells,), z, uniforms, codes, fed, broken, places, now, clock, 1, vocabulary, 3, 1,
           settings.top_k, settings.top_p, GREEDY=settings.greedy, TOP_K=settings.top_k > 0, TOP_P=settings.top_p < 1,
           BLOCK=block)  # fmt: skip
    assert int(clock) == 2
    assert torch.equal(codes[:, 2], fed[:, 0])
    return codes[:, 2], broken


@pytest.mark.parametrize("settings", [
    SamplingSettings(), SamplingSettings(greedy=True), SamplingSettings(top_k=9),
    pytest.param(SamplingSettings(top_p=0.7), marks=pytest.mark.slow),
    pytest.param(SamplingSettings(top_k=20, top_p=0.8), marks=pytest.mark.slow),
])  # fmt: skip
def test_codes_are_those_of_the_sampler(settings: SamplingSettings) -> None:
    """Ties at a threshold included: logits are multiples of 1/4. In blocks of 16, the last one partly filled."""
    generator = torch.Generator().manual_seed(3)
    z = (torch.randn(8, 53, generator=generator) * 6).round() / 4
    z[::3, torch.rand(53, generator=generator) < 0.6] = float("-inf")
    z[2], z[4], z[4, 30], z[5] = 0.0, float("-inf"), 1.0, -0.0
    noise = torch.rand(8, generator=generator, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    got, broken = drawn(z, noise, settings, 16)
    assert torch.equal(got, choose(z.double(), noise, settings))
    assert not broken.any()


@pytest.mark.slow
def test_codes_of_a_real_vocabulary() -> None:
    """The float64 CDF of 16,384 codes, with edges closer than float32 could tell."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(24, 16384, generator=generator) * 2
    noise = torch.rand(24, generator=generator, dtype=torch.float64)
    for n, settings in ((24, SamplingSettings()), (2, SamplingSettings(top_k=2000, top_p=0.95))):
        assert torch.equal(drawn(z[:n], noise[:n], settings, 2048)[0], choose(z[:n].double(), noise[:n], settings))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_unusable_logits_are_reported() -> None:
    """Of the step that `now` names, and only there; -inf alone is no error."""
    z = torch.zeros(1, 20)
    for value, bad in ((float("nan"), 1), (float("inf"), 1), (float("-inf"), 0)):
        z[0, 18] = value
        assert drawn(z, torch.tensor([0.5]), SamplingSettings(), 16)[1].tolist() == [0, bad]
    assert drawn(z.fill_(float("-inf")), torch.tensor([0.5]), SamplingSettings(), 16)[1].tolist() == [0, 1]
