"""Decoding against the official greedy samplers, and its contract: forwards, draws, seeds, errors."""

from typing import Any

import pytest
import tiny
import torch
from tiny import flashar_golden, llamagen_golden
from torch import Tensor

from flashar_pl.backbones import LlamaGen, TextFeatures
from flashar_pl.decoding import Engine, generate, loop
from flashar_pl.decoding.loop import Progress
from flashar_pl.models import FlashAR, RasterAR

GRIDS = [(1, 1), (1, 4), (4, 1), (2, 3), (4, 4)]


# --- official tokens: greedy, so that they must match exactly --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cfg1", {}), ("cfg2", {"cfg_scale": 2.0}), ("cfg2_interval10", {"cfg_scale": 2.0, "cfg_interval": 10})],
)
def test_class_conditional_raster_tokens(name: str, settings: dict[str, Any]) -> None:
    model = LlamaGen.from_official(llamagen_golden("gpt_c2i_tiny")[0], n_head=4)
    _, arrays = llamagen_golden("gpt_c2i_tiny_generate")
    codes = generate(model, arrays["in/class_ids"], (8, 8), plan="raster", greedy=True, **settings)
    assert torch.equal(codes.flatten(1), arrays[f"out/tokens_{name}"].long())


@pytest.mark.parametrize(
    ("name", "scale", "masked"), [("cfg1", 1.0, True), ("cfg2", 2.0, True), ("cfg1_nomask", 1.0, False)]
)
def test_text_conditional_raster_tokens(name: str, scale: float, masked: bool) -> None:
    state, arrays = llamagen_golden("gpt_t2i_tiny")
    condition = TextFeatures(arrays["in/caption_features"], arrays["in/caption_mask"] if masked else None)
    codes = generate(LlamaGen.from_official(state, 4), condition, (8, 8), "raster", cfg_scale=scale, greedy=True)
    assert torch.equal(codes.flatten(1), arrays[f"out/tokens_{name}"].long())


@pytest.mark.parametrize("scale", [1, 2])
def test_nar_diagonal_tokens(scale: int) -> None:
    state, arrays = llamagen_golden("nar_tiny")
    model = FlashAR.from_nar(state, n_head=4)
    codes = generate(model, arrays["in/generate_class_ids"], (8, 8), cfg_scale=scale, greedy=True)
    assert torch.equal(codes.flatten(1), arrays[f"out/tokens_cfg{scale}"].long())


@pytest.mark.parametrize("scale", [1, 2])
def test_flashar_diagonal_tokens_and_branch_logits(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official logits of the conditional rows, then of the unconditional ones, before guidance."""
    state, arrays = flashar_golden("llamagen_flashar_tiny_nogate")
    model, steps = FlashAR.from_nar(state, n_head=4), []
    original = model.step_logits

    def record(*args: Any) -> Tensor:
        steps.append(original(*args))
        return steps[-1]

    monkeypatch.setattr(model, "step_logits", record)
    codes = generate(model, arrays["in/generate_class_ids"], (4, 4), cfg_scale=scale, greedy=True)
    assert torch.equal(codes, arrays[f"out/cfg{scale}_tokens"])
    order = model.make_plan(None, 4, 4).order
    by_cell = torch.empty(2 * scale, 16, 192).index_copy_(1, order, torch.cat(steps, 1))
    expected = arrays[f"out/cfg{scale}_branch_logits"].flatten(1, 2)
    torch.testing.assert_close(by_cell, expected, atol=1e-4, rtol=1e-4)


# --- forwards and draws ----------------------------------------------------------------------------------------------


class Counter:
    """Counts forwards, fed positions and draws of one generate call."""

    def __init__(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        backbone = getattr(model, "backbone", model)
        self.fed: list[int] = []
        self.rows: list[int] = []
        self.draws: list[int] = []
        backbone.blocks[0].register_forward_hook(self._forward)
        original = loop.choose

        def choose(logits: Tensor, uniform: Tensor, settings: Any) -> Tensor:
            self.draws.append(logits.shape[1])
            assert uniform.shape == logits.shape[:2]
            return original(logits, uniform, settings)

        monkeypatch.setattr(loop, "choose", choose)

    def _forward(self, _module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        self.rows.append(inputs[0].shape[0])
        self.fed.append(inputs[0].shape[1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("plan", ["diagonal", "raster"])
def test_one_forward_per_step_and_one_draw_per_cell(
    plan: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """H + W - 1 or H * W forwards, prefill included; the last step's codes are never fed."""
    height, width = grid
    model = tiny.flashar()
    count = Counter(model, monkeypatch)
    codes = generate(model, tiny.classes(2), grid, plan, cfg_scale=2.0, seeds=0)
    steps = height + width - 1 if plan == "diagonal" else height * width
    assert len(count.fed) == len(count.draws) == steps
    assert sum(count.draws) == height * width
    assert count.fed == [1, *count.draws[:-1]], "the prefix, then each step's codes once"
    assert set(count.rows) == {4}, "both guidance rows in one batch"
    assert codes.shape == (2, height, width)
    assert codes.dtype == torch.int64


def test_without_guidance_there_is_no_second_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.flashar()
    count = Counter(model, monkeypatch)
    generate(model, tiny.classes(3), (3, 3), cfg_scale=1.0, cfg_interval=2)
    assert set(count.rows) == {3}


def test_unconditional_rows_end_with_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells decoded before a step: 0, 1, 3, 6, 8; with k = 2 those with at most 3 are guided."""
    model = tiny.flashar()
    count = Counter(model, monkeypatch)
    generate(model, tiny.classes(2), (3, 3), cfg_scale=2.0, cfg_interval=2)
    assert count.rows == [4, 4, 4, 2, 2]


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["diagonal", "raster"])
def test_a_step_is_told_with_the_codes_so_far(plan: str) -> None:
    """Guards a picture that shows cells of later steps, left over from the batch before, or cells at wrong places."""
    engine, seen = Engine(tiny.flashar(), "eager"), list[Progress]()
    engine.generate(tiny.classes(2), (3, 4), plan, seeds=5)
    early = list[Tensor]()
    codes = engine.generate(
        tiny.classes(2), (3, 4), plan, seeds=0, on_step=lambda p: (seen.append(p), early.append(p.codes()))
    )
    order = engine.model.make_plan(plan, 3, 4)
    assert [progress.steps for progress in seen] == list(range(1, order.n_steps + 1))
    for progress, found in zip(seen, early, strict=True):
        drawn = (order.step < progress.steps).view(3, 4)
        assert torch.equal(found, torch.where(drawn, codes, -1))


def test_what_a_watcher_raises_ends_the_decoding() -> None:
    """And the next batch of the same engine is whole."""
    engine = Engine(tiny.flashar(), "eager")
    expected = engine.generate(tiny.classes(2), (3, 4), seeds=0)

    def leave(progress: Progress) -> None:
        if progress.steps == 3:
            raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        engine.generate(tiny.classes(2), (3, 4), seeds=1, on_step=leave)
    assert torch.equal(engine.generate(tiny.classes(2), (3, 4), seeds=0), expected)


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["diagonal", "raster"])
def test_a_sample_depends_on_its_own_seed_only(plan: str) -> None:
    """In float64, where rounding between batch sizes cannot move a code across an edge of its CDF."""
    model = tiny.flashar().double()
    ids = torch.tensor([0, 3, 1, 3])
    settings: dict[str, Any] = {"grid": (3, 4), "plan": plan, "cfg_scale": 1.5, "temperature": 1.2, "top_p": 0.95}
    together = generate(model, ids, seeds=[11, 5, 40, 6], **settings)
    for i, seed in enumerate([11, 5, 40, 6]):
        assert torch.equal(generate(model, ids[i : i + 1], seeds=seed, **settings)[0], together[i])
    assert torch.equal(generate(model, ids, seeds=torch.tensor([11, 5, 40, 6]), **settings), together)
    assert not torch.equal(together[1], together[3]), "same class, other seed"


def test_equal_seeds_are_bit_identical_and_no_seed_is_random() -> None:
    model, ids = tiny.flashar(), tiny.classes(2)
    assert torch.equal(generate(model, ids, (4, 4), seeds=1), generate(model, ids, (4, 4), seeds=1))
    assert not torch.equal(generate(model, ids, (4, 4), seeds=1), generate(model, ids, (4, 4), seeds=3))
    torch.manual_seed(0)
    assert not torch.equal(generate(model, ids, (4, 4)), generate(model, ids, (4, 4)))


def test_uniforms_belong_to_cells_not_to_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raster and diagonal decoding use the same number at the same cell, so that plans can be compared."""
    seen: dict[str, Tensor] = {}
    for plan in ("raster", "diagonal"):
        parts: list[Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(loop, "choose", lambda z, u, s, parts=parts: parts.append(u) or z.argmax(-1))
            generate(tiny.flashar(), tiny.classes(2), (2, 3), plan, seeds=5)
        order = tiny.flashar().make_plan(plan, 2, 3).order
        seen[plan] = torch.empty(2, 6, dtype=torch.float64).index_copy_(1, order, torch.cat(parts, 1))
    assert torch.equal(seen["raster"], seen["diagonal"])


# --- modes and errors ------------------------------------------------------------------------------------------------


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = tiny.flashar(token_dropout=0.5).train()
    model.vertical.eval()
    ids = tiny.classes(2)
    first = generate(model, ids, (3, 3), seeds=0)
    assert torch.equal(generate(model, ids, (3, 3), seeds=0), first)
    assert model.training
    assert model.backbone.training
    assert not model.vertical.training


def test_no_graph_is_kept_and_inference_mode_works() -> None:
    model = tiny.flashar()
    assert not generate(model, tiny.classes(1), (2, 2)).requires_grad
    with torch.inference_mode():
        generate(model, tiny.classes(1), (6, 5), cfg_scale=2.0)
    model.loss(tiny.codes(1, 6, 5), tiny.classes(1))["loss"].backward()


def test_autocast_does_not_change_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation samples inside the training's bfloat16 context; samples follow the weights' own precision."""
    seen: list[Tensor] = []
    monkeypatch.setattr(loop, "choose", lambda z, u, s: seen.append(z) or z.argmax(-1))
    generate(tiny.flashar(), tiny.classes(2), (3, 3), cfg_scale=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        generate(tiny.flashar(), tiny.classes(2), (3, 3), cfg_scale=2.0)
    for plain, autocast in zip(seen[:5], seen[5:], strict=True):
        assert torch.equal(plain, autocast)


def test_a_given_unconditional_replaces_the_null_class() -> None:
    model, ids = tiny.flashar().double(), tiny.classes(2)
    other = torch.full((2,), 4)
    null = torch.full((2,), tiny.CLASSES)

    def run(unconditional: Tensor | None) -> Tensor:
        return generate(model, ids, (4, 4), cfg_scale=4.0, seeds=1, unconditional=unconditional)

    assert torch.equal(run(None), run(null))
    assert not torch.equal(run(None), run(other))
    assert torch.equal(generate(model, ids, (4, 4), cfg_scale=0.0, seeds=1), generate(model, null, (4, 4), seeds=1)), (
        "scale 0 is the unconditional model"
    )


def test_a_bare_backbone_decodes_in_raster_order_only() -> None:
    backbone = tiny.backbone()
    expected = generate(RasterAR(backbone), tiny.classes(2), (2, 3), "raster", seeds=0)
    assert torch.equal(generate(backbone, tiny.classes(2), (2, 3), "raster", seeds=0), expected)
    for model in (backbone, RasterAR(backbone)):
        with pytest.raises(ValueError, match=r"needs a vertical head.*FlashAR\(backbone, branch_layer=m\)"):
            generate(model, tiny.classes(2), (2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1, 2, 3]}, "seeds has 3 entries; expected one int or 2 entries"),
        ({"grid": (0, 3)}, r"grid is \(0, 3\)"),
        ({"grid": (3,)}, r"grid is \(3,\); expected \(H, W\)"),
        ({"plan": "spiral"}, "plan is 'spiral'"),
        ({"condition": torch.zeros(0, dtype=torch.int64)}, "holds no samples"),
        ({"condition": tiny.captions([1, 2])}, "class-conditional; expected class ids"),
        ({"cfg_scale": 2.0, "unconditional": tiny.captions([1, 2])}, "class-conditional; expected class ids"),
        ({"cfg_scale": 2.0, "unconditional": torch.zeros(3, dtype=torch.int64)}, "has 3 samples; expected 2"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.flashar()
    count = Counter(model, monkeypatch)
    with pytest.raises(ValueError, match=message):
        generate(model, **{"condition": tiny.classes(2), "grid": (2, 3), **arguments})
    assert not count.fed
