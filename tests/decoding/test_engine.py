"""The engine: every runner gives the codes of the plain loop, buffers are reused, and prompts share buckets."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flashar_pl.backbones import Condition, Prefix
from flashar_pl.decoding import Engine, engine, generate
from flashar_pl.decoding.engine import pad_prefix
from flashar_pl.decoding.loop import Buffers, Inputs, decode
from flashar_pl.decoding.prefill import prefill_by_length
from flashar_pl.layers import compiled as compiled_layers
from flashar_pl.layers.transformer import Block
from flashar_pl.models.base import GridModel
from flashar_pl.models.intra import IntraHead
from flashar_pl.options import SamplingSettings

PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9]), torch.tensor([4, 9])]
NULLS = [torch.tensor([1, 2, 3, 4, 9])] * 3


def make(kind: str) -> tuple[GridModel, Condition, dict[str, Any]]:
    """A model, conditions of three samples, and what guidance needs besides. In float64: codes are compared."""
    if kind == "emu":
        return tiny.emu_flashar().double(), PROMPTS, {"unconditional": NULLS}
    if kind == "text":
        return tiny.flashar(condition="text").double(), tiny.captions([2, 5, 3]), {}
    return tiny.flashar(n_head=4, n_kv_head=2).double(), tiny.classes(3), {}


def inputs_of(model: GridModel, condition: Condition, plan: Any, settings: SamplingSettings, seed: int) -> Inputs:
    prefix = model.prefix(condition)
    rope = model.rope(plan, prefix, settings.guided)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(3, plan.n_cells, dtype=torch.float64, generator=generator)
    return Inputs(prefix, rope, noise)


def test_a_wider_cache_where_it_measures_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards one query over a bfloat16 cache, 9 times slower on some processors, and the room for a wider one."""
    monkeypatch.setattr(engine, "PACKED_WIDTH", 1)
    monkeypatch.setattr(engine, "wide_cache_pays", lambda *shape: asked.append(shape) or True)
    size = 1  # of keys and values in float32, by the first turn
    for times, runs, dtype in ((2**40, 1, torch.float32), (4, 0, torch.bfloat16)):
        asked: list[Any] = []
        memory = times * size
        monkeypatch.setattr(engine, "available_memory", lambda device, memory=memory: memory)
        model = make("class")[0].bfloat16()
        drawing = Engine(model, "eager")
        assert drawing.generate(tiny.classes(3), (2, 3), "raster", seeds=0).shape == (3, 2, 3)
        [buffers] = drawing._kept.values()
        assert (buffers.cache.keys.dtype, len(asked)) == (dtype, runs)
        size = 2 * buffers.cache.keys.nbytes
    model, condition, _ = make("class")
    order, settings = model.make_plan("raster", 2, 3), SamplingSettings()
    inputs = inputs_of(model.float(), model.backbone.check_condition(condition), order, settings, 0)
    both = [Buffers.allocate(model, order, inputs, each) for each in (None, torch.float64)]
    with torch.no_grad():
        for buffers in both:
            for _ in decode(model, order, settings, inputs, buffers):
                pass
    assert torch.equal(both[0].drawn, both[1].drawn)


@torch.no_grad()
def test_prompts_are_fed_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a short prompt at the price of the longest, and one empty prompt a sample; the codes stay."""
    model, prompts, guidance = make("emu")
    settings = SamplingSettings(cfg_scale=2.0)
    for plan in ("raster", "diagonal"):
        order = model.make_plan(plan, 2, 3)
        given = model.backbone.with_unconditional(prompts, guidance["unconditional"])
        inputs = inputs_of(model, given, order, settings, seed=0)
        drawn, fed = [], []
        for prefill in (None, prefill_by_length):
            buffers = Buffers.allocate(model, order, inputs)
            buffers.cache.keys.fill_(torch.nan)
            for _ in decode(model, order, settings, inputs, buffers, prefill):
                pass
            drawn.append(buffers.drawn)
            monkeypatch.setattr(
                model, "prefill", lambda x, *rest, of=model.prefill, fed=fed: fed.append(x.shape[:2]) or of(x, *rest)
            )
        assert torch.equal(*drawn)
        assert fed == [(1, 2), (1, 4), (1, 5), (1, 7)]
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("class", "diagonal"), ("text", "raster"),
        *(pytest.param(*each, marks=pytest.mark.slow)
          for each in [("class", "raster"), ("text", "diagonal"), ("emu", "raster"), ("emu", "diagonal")]),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_recorded_loop_serves_other_inputs(kind: str, plan: str) -> None:
    """What a CUDA graph relies on: the operations of one batch, replayed with other inputs, decode those.

    The trace fails where control flow depends on values, and differs where a value was read outside the inputs.
    """
    model, condition, guidance = make(kind)
    sampling = SamplingSettings(cfg_scale=2.0, cfg_interval=1, top_k=12, top_p=0.95)
    order = model.make_plan(plan, 2, 3)
    others = {
        "class": tiny.classes(3) + 2,
        "text": tiny.captions([4, 1, 5], seed=7),
        "emu": [p.flip(0) for p in PROMPTS],
    }
    batches = []
    for given in (condition, others[kind]):
        both = model.backbone.with_unconditional(given, guidance.get("unconditional")) if sampling.guided else given
        batches.append(inputs_of(model, both, order, sampling, seed=len(batches)))
    masked = batches[0].prefix.mask is not None

    def run(x: Tensor, mask: Tensor, lengths: Tensor, rope: Tensor, noise: Tensor) -> Tensor:
        inputs = Inputs(Prefix(x, lengths, mask if masked else None), rope, noise)
        buffers = Buffers.allocate(model, order, inputs)
        for _ in decode(model, order, sampling, inputs, buffers):
            pass
        return buffers.drawn.clone()

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        none = torch.zeros(0)
        prefix = inputs.prefix
        return prefix.x, none if prefix.mask is None else prefix.mask, prefix.lengths, inputs.rope, inputs.noise

    expected = run(*arguments(batches[1]))  # also fills the plan's tables
    trace = make_fx(run)(*arguments(batches[0]))
    assert torch.equal(trace(*arguments(batches[1])), expected)
    assert not torch.equal(run(*arguments(batches[0])), expected), "the batches must differ for this to mean anything"


def test_later_batches_reuse_the_buffers_and_do_not_see_the_former_ones() -> None:
    model, condition, _ = make("class")
    kept = Engine(model, "eager")
    settings: dict[str, Any] = {"grid": (3, 4), "cfg_scale": 2.0, "cfg_interval": 2}
    first = kept.generate(condition, seeds=1, **settings)
    memory = {id(buffers) for buffers in kept._kept.values()}
    second = kept.generate(condition + 1, seeds=5, **settings)
    assert {id(buffers) for buffers in kept._kept.values()} == memory
    assert torch.equal(first, generate(model, condition, seeds=1, **settings))
    assert torch.equal(second, generate(model, condition + 1, seeds=5, **settings))


def test_only_the_latest_shape_is_kept() -> None:
    """Batches of prompts have many lengths; the planner counts one cache."""
    model, condition, _ = make("class")
    kept = Engine(model, "eager")
    for width in (2, 3, 4):
        kept.generate(condition, (2, width), seeds=0)
    assert [key[0].width for key in kept._kept] == [4]


def test_other_groups_of_a_diagonal_are_another_recording() -> None:
    """`--groups`, or a notebook, changes what a step does: a graph of before would draw with the old ones."""
    model = tiny.flashar()
    model.dual_head.intra = IntraHead(model.backbone.dim, 2)
    kept, keys = Engine(model, "eager"), []
    for groups in (2, 4):
        model.dual_head.intra.groups = groups
        kept.generate(tiny.classes(1), (3, 4), seeds=0)
        keys += kept._kept
    assert len({*keys}) == 2


def test_the_latest_graphs_are_kept_while_memory_suffices() -> None:
    """A batch that fits alone must not fail because of the graphs of others."""
    kept = Engine(make("class")[0], "eager")
    kept.runner = "graphs"  # `_keep` records nothing itself
    made: list[Any] = [object() for _ in range(engine.KEPT + 3)]
    for number in range(engine.KEPT + 1):
        assert kept._keep(number, lambda number=number: made[number]) is made[number]  # type: ignore[misc]
    assert list(kept._kept) == list(range(1, engine.KEPT + 1))
    tries = []

    def large() -> Any:
        tries.append(len(kept._kept))
        if tries[-1]:
            raise torch.OutOfMemoryError("no memory beside the others")
        return made[-1]

    assert kept._keep("large", large) is made[-1]
    assert tries == [engine.KEPT - 1, 0]
    assert list(kept._kept) == ["large"]

    def too_large() -> Any:
        raise torch.OutOfMemoryError("no memory at all")

    with pytest.raises(torch.OutOfMemoryError, match="at all"):
        kept._keep("too large", too_large)


def test_devices_that_share_a_model_do_not_try_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that made a batch's graphs a second time would wait for sums to which no other device adds."""
    kept = Engine(make("class")[0], "eager")
    monkeypatch.setattr(GridModel, "shared", True)
    kept._keep(0, lambda: object())  # type: ignore[arg-type,return-value]
    tries = []

    def large() -> Any:
        tries.append(1)
        raise torch.OutOfMemoryError("no memory beside the others")

    kept.runner = "graphs"
    with pytest.raises(torch.OutOfMemoryError):
        kept._keep(1, large)
    assert tries == [1]


def test_buffers_made_in_inference_mode_serve_later_batches() -> None:
    """A notebook that warms an engine up under inference mode; tensors made there refuse to be written outside."""
    model, condition, _ = make("class")
    kept = Engine(model, "eager")
    with torch.inference_mode():
        first = kept.generate(condition, (2, 3), seeds=1)
    assert torch.equal(kept.generate(condition, (2, 3), seeds=1), first)


@pytest.mark.parametrize("plan", ["raster", "diagonal"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefix_buckets_change_no_code(batch: int, scale: float, plan: str) -> None:
    model, _, _ = make("emu")
    asked: dict[str, Any] = {"grid": (3, 4), "plan": plan, "cfg_scale": scale, "seeds": 3}
    if scale != 1:
        asked["unconditional"] = NULLS[:batch]
    expected = generate(model, PROMPTS[:batch], **asked)
    engine = Engine(model, "eager")
    engine.prefix_bucket = 16
    assert torch.equal(engine.generate(PROMPTS[:batch], **asked), expected)


def test_a_prefix_that_fills_its_bucket_gets_no_mask() -> None:
    """A mask costs the fast attention kernels."""
    model = tiny.emu()
    full = model.prefix([torch.arange(5, 13)] * 2)
    assert pad_prefix(full, 8).mask is None
    assert pad_prefix(full, 4) is full
    padded = pad_prefix(model.prefix([torch.arange(5, 12), torch.arange(5, 8)]), 8)
    assert padded.mask is not None
    assert padded.mask.sum(1).tolist() == [7, 3] == padded.lengths.tolist()
    assert padded.mask[:, -3:].all()


def fake_compile(calls: list[Any]) -> Callable[..., Any]:
    """`torch.compile` with the tracer and without the code generator."""
    original = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        calls.append(function)
        return original(function, backend="eager", fullgraph=True, **options)

    return compile


@pytest.mark.slow
def test_compiled_blocks_decode_the_same_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", fake_compile(calls))
    model, condition, _ = make("class")
    compiled = Engine(model, "compiled")
    for plan in ("raster", "diagonal"):
        codes = compiled.generate(condition, (3, 4), plan, cfg_scale=2.0, seeds=1)
        assert torch.equal(codes, generate(model, condition, (3, 4), plan, cfg_scale=2.0, seeds=1))
    assert calls == [Block.before, Block.after], "one compiled function serves every block and plan"
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert blocks
    assert not any("before" in vars(block) or "after" in vars(block) for block in blocks)


@pytest.mark.slow
def test_many_compiled_models_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its own limit of forms, 8, torch runs a function eagerly: a benchmark called such rows compiled."""
    made: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
    torch._dynamo.reset()
    model = tiny.flashar(dim=16, n_head=4)
    with torch._dynamo.config.patch(recompile_limit=2):  # sooner than after 8
        for plan in ("raster", "diagonal"):
            for scale in (1.0, 2.0):
                Engine(model, "compiled").generate(tiny.classes(1), (2, 3), plan, cfg_scale=scale, seeds=0)
    assert len(made) >= 8
    monkeypatch.setattr(compiled_layers, "VARIANTS", 1)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"torch.compile failed: .*limit"):
        Engine(model, "compiled").generate(tiny.classes(1), (2, 3), seeds=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor_decodes_the_same() -> None:
    for kind in ("class", "emu"):
        model, condition, guidance = make(kind)
        compiled = Engine(model, "compiled")
        for plan in ("raster", "diagonal"):
            asked: dict[str, Any] = {"cfg_scale": 2.0, "seeds": 1, **guidance}
            codes = compiled.generate(condition, (3, 5), plan, **asked)
            assert torch.equal(codes, generate(model, condition, (3, 5), plan, **asked))


def test_a_failed_compile_names_its_cause_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=broken, **options))
    model, condition, _ = make("class")
    with pytest.raises(ValueError, match=r"(?s)torch.compile failed: .*no C\+\+ compiler.*runner eager"):
        Engine(model, "compiled").generate(condition, (2, 2), seeds=0)
    assert generate(model, condition, (2, 2), seeds=0).shape == (3, 2, 2)


def test_runners_that_cannot_be() -> None:
    model, _, _ = make("class")
    assert Engine(model, "auto").runner == "eager"
    with pytest.raises(ValueError, match="runner is 'turbo'; expected one of auto, eager, compiled, graphs"):
        Engine(model, "turbo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="graphs, and the model is on cpu; CUDA graphs need a CUDA device"):
        Engine(model, "graphs")


def test_broken_weights_are_an_error_and_not_codes() -> None:
    """The last code of the vocabulary would be drawn everywhere."""
    model, condition, _ = make("class")
    with torch.no_grad():
        model.backbone.blocks[1].feed_forward.w2.weight[0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="logits of decoding step 0 are NaN or infinite in float64; the weights are"):
        generate(model, condition, (2, 3), seeds=0)
