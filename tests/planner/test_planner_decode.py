"""The planner's arithmetic against real modules: GEMM shapes, cache bytes, batch limits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import CAPTION_DIM, captions, classes

from flashar_pl.backbones import Prompts
from flashar_pl.benchmarking.plain import generate_plain
from flashar_pl.checkpoints.description import build_model
from flashar_pl.decoding import generate
from flashar_pl.decoding.prepare import prepare
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.layers.rounded import RoundedLinear
from flashar_pl.options import SamplingSettings
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes

TINY = {"kind": "llamagen", "dim": 16, "n_layer": 3, "n_head": 4, "vocab_size": 19, "num_classes": 5, "multiple_of": 8}
TEXT = {**TINY, "condition": "text", "caption_dim": CAPTION_DIM, "n_kv_head": 2}
EMU = {
    "kind": "emu35", "dim": 24, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "ffn_dim": 40,
    "vocab_size": 60, "rope_base": 1e4, "norm_eps": 1e-6, "visual_token_offset": 41, "eol_token_id": 2,
    "boi_token_id": 3,
}  # fmt: skip
CONFIGS = [
    {"kind": "flashar", "backbone": TINY, "branch_layer": 1},
    {"kind": "flashar", "backbone": TEXT, "branch_layer": 3, "vertical_layers": 2, "fusion": "average"},
    {"kind": "flashar", "backbone": EMU},
]


def build(config):
    """The module that a configuration describes."""
    return build_model(model_sizes(config).config)


def planned_gemms(job):
    """The same of a planned job."""
    gemms = [gemm for forward in job.forwards for gemm in forward.gemms]
    return sorted((gemm.rows, gemm.linear.n_in, gemm.linear.n_out) for gemm in gemms for _ in range(gemm.count))


def recorded_gemms(model, condition, grid, plan, cfg_scale, unconditional=None):
    """(rows, n_in, n_out) of every F.linear call of one `generate`, sorted."""
    calls = []
    real = F.linear

    def linear(x, weight, bias=None):
        if weight.shape[0] > 1 and x.numel():  # the gate's last layer has one output and is not worth a GEMM
            calls.append((x.numel() // x.shape[-1], weight.shape[1], weight.shape[0]))
        return real(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        generate(model, condition, grid, plan, cfg_scale=cfg_scale, seeds=0, unconditional=unconditional)
    return sorted(calls)


@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize(("config", "cfg_scale"), [(CONFIGS[0], 2.0), (CONFIGS[0], 1.0), (CONFIGS[1], 2.0)])
def test_gemm_shapes_are_those_of_the_decoder(config, cfg_scale, plan):
    """Guards the GEMM-only target: a wrong row count or a head that is not needed would move it."""
    model = build(config).eval()
    sizes = model_sizes(config)
    text = config is CONFIGS[1]
    condition = captions([3, 5, 4]) if text else classes(3)
    grid = (3, 5)
    job = DecodeJob(sizes, plan, grid, 3, cfg_scale != 1, torch.float32, prefix=5 if text else 1)
    assert planned_gemms(job) == recorded_gemms(model, condition, grid, plan, cfg_scale)


def test_gemm_shapes_of_emu_with_row_ends_and_text_rows():
    """Row-end tokens are fed with their neighbour, and text rows of the head are not computed."""
    config = CONFIGS[2]
    model = build(config).eval()
    prompts = [torch.tensor([5, 6, 7, 3]), torch.tensor([5, 6, 2, 3])]
    empty = [torch.tensor([8, 9, 9, 3]), torch.tensor([8, 9, 2, 3])]  # equal ones would be fed once on a CPU
    for plan in ("raster", "diagonal"):
        job = DecodeJob(model_sizes(config), plan, (3, 4), 2, True, torch.float32, prefix=4)
        assert planned_gemms(job) == recorded_gemms(model, prompts, (3, 4), plan, 2.0, empty)


def test_published_floors():
    """LlamaGen-L on 4.8 TB/s: about 4.7 ms for 31 forwards. Emu3.5-34B, visual rows: 63.8 GB per raster step."""
    large = DecodeJob(model_sizes({"backbone": {"preset": "llamagen-l"}}), "diagonal", (16, 16))
    assert len(large.forwards) == 31
    assert large.floor(4.8e12, 989e12) == pytest.approx(4.75e-3, rel=0.01)
    emu = DecodeJob(model_sizes({"backbone": {"preset": "emu35-34b"}}), "raster", (32, 32))
    assert emu.forwards[100].weight_bytes == pytest.approx(63.75e9, rel=1e-3)
    assert emu.flops == pytest.approx(134e12, rel=0.1)  # reference arithmetic leaves attention out


@pytest.mark.parametrize("rounding", ["int8", "fp8"])
def test_rounded_weights_are_read_as_they_are_held(rounding):
    """A floor of twice the bytes would look as if it were beaten."""
    model = build(CONFIGS[0])
    rounded = [part for part in prepare(model, rounding).modules() if isinstance(part, RoundedLinear)]
    held = sum(part.q.nbytes + part.scale.nbytes for part in rounded)
    job = DecodeJob(model_sizes(CONFIGS[0]), "diagonal", (3, 3), dtype=torch.float32)
    plain, read = (each.forwards[2] for each in (job, replace(job, rounded=True)))
    assert plain.weight_bytes - read.weight_bytes == 4 * sum(part.q.numel() for part in rounded) - held
    assert (plain.cache_bytes, plain.flops) == (read.cache_bytes, read.flops)


def test_bytes_of_a_small_job_by_hand():
    """One block, 1 x 2 grid, raster, no guidance: two forwards of one position."""
    tiny = {**TINY, "n_layer": 1, "n_head": 4}
    sizes = model_sizes({"kind": "raster", "backbone": tiny})
    job = DecodeJob(sizes, "raster", (1, 2), 1, False, torch.float32)
    block = 16 * 48 + 16 * 16 + 16 * 2 * 48 + 48 * 16 + 2 * 16
    assert [f.weight_bytes for f in job.forwards] == [4 * (block + 16 + 19 * 16)] * 2
    assert [f.cache_bytes for f in job.forwards] == [4 * (2 * 16 * (1 + 1) + 16), 4 * (2 * 16 * (2 + 1) + 16)]
    assert job.forwards[1].flops == 2 * (block - 32 + 19 * 16) + 4 * 16 * 2


def test_cache_and_weights_of_decode_memory():
    config = CONFIGS[0]
    sizes, model = model_sizes(config), build(config)
    memory = DecodeJob(sizes, "diagonal", (4, 4), 3, True, torch.bfloat16).memory
    cache = KVCache(model.cache_spec(), 6, 1 + 15, torch.bfloat16, "cpu")  # the last step is never fed
    assert memory.cache == cache.keys.nbytes + cache.values.nbytes
    assert memory.weights == 2 * sum(p.numel() for p in model.parameters())


def test_largest_batch_is_the_last_that_fits():
    sizes = model_sizes({"backbone": {"preset": "llamagen-b"}})
    available = 2 * 2**30
    job = DecodeJob(sizes, "diagonal", (16, 16))
    best = job.largest_batch(available)
    assert replace(job, batch=best).memory.total <= available
    assert replace(job, batch=best + 1).memory.total > available
    assert job.largest_batch(10 * 2**20) == 0
    assert job.largest_batch(2**50, cap=7) == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "nar", "backbone": TINY}, "model kind is 'nar'"),
        ({"kind": "flashar", "backbone": TINY, "branch_layer": 4}, "branch_layer is 4; expected 0 to 3"),
        ({"kind": "raster", "backbone": {"kind": "llamagen", "width": 3}}, "no option 'width'"),
    ],
)
def test_wrong_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        model_sizes(config)


def test_a_raster_model_has_no_diagonal_job():
    with pytest.raises(ValueError, match="needs a vertical head"):
        _ = DecodeJob(model_sizes({"kind": "raster", "backbone": TINY}), "diagonal", (2, 2)).order


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_plain_raster_draws_the_same_codes(cfg_scale):
    """Guards the comparison: a baseline that does other work would make the speed-up meaningless."""
    torch.manual_seed(0)
    model = build({"kind": "raster", "backbone": {**TINY, "vocab_size": 19}}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    settings = SamplingSettings(cfg_scale=cfg_scale)
    ours = generate(model, classes(3), (3, 4), "raster", cfg_scale=cfg_scale, seeds=0)
    assert torch.equal(generate_plain(model, classes(3), (3, 4), settings, seeds=0), ours)


def test_plain_raster_of_unequal_prompts_and_row_ends(monkeypatch):
    """What guidance needs besides goes to the model's device too: the benchmark of Emu3.5 on a GPU failed without."""
    moved, real = [], Prompts.to
    monkeypatch.setattr(Prompts, "to", lambda given, to: (moved.append(given), real(given, to))[1])
    torch.manual_seed(0)
    model = build({"kind": "raster", "backbone": EMU}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    prompts, empty = [torch.tensor([5, 6, 7, 3]), torch.tensor([9, 3])], [torch.tensor([8, 3])] * 2
    settings = SamplingSettings(cfg_scale=2.0)
    ours = generate(model, prompts, (3, 4), "raster", cfg_scale=2.0, seeds=0, unconditional=empty)
    plain = generate_plain(model, prompts, (3, 4), settings, seeds=0, unconditional=empty)
    assert torch.equal(plain, ours)
    assert [len(given[0]) for given in moved[-2:]] == [4, 2]


@pytest.mark.parametrize("clean", [False, True])
def test_every_call_of_block_diffusion_is_counted(clean):
    """S calls a block: of the whole sequence, or with a cache of the block, first also of what has become final."""
    config = {"kind": "block_diffusion", "strategy": "row", "steps": 3, "clean_context": clean, "backbone": TINY}
    job = DecodeJob(model_sizes(config), "blocks", (2, 5), guided=False)
    whole, cached = [(11, 11)] * 6, [(6, 6), (5, 6), (5, 6), (10, 11), (5, 11), (5, 11)]
    assert [call[:2] for call in job.calls] == (cached if clean else whole)
    assert len(job.forwards) == 6
    embedded = job.calls[0][0] * job.sizes.dim * job.dtype.itemsize
    assert clean == (job.forwards[0].cache_bytes > embedded)  # without a cache nothing is kept
