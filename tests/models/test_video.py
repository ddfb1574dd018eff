"""Diagonals of all frames of a video: the plan, the third branch, and decoding against the whole model."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashar_pl.decoding import Engine, generate
from flashar_pl.decoding.parity import misplacement
from flashar_pl.grid import NONE, PREFIX, diagonal_plan, raster_plan
from flashar_pl.models import FlashAR
from flashar_pl.training.config import VideoConfig

FRAMES, HEIGHT, WIDTH = 3, 2, 4
GRID = FRAMES * HEIGHT, WIDTH
sides = st.integers(1, 5)


def video(delay: int = 1, seed: int = 0, **options) -> FlashAR:
    """A model whose three branches and both gates differ, as after training."""
    model = FlashAR(tiny.backbone(seed), 1, video={"frames": FRAMES, "delay": delay}, **options)
    tiny.randomise(model, seed + 1)
    return model.double().eval()


@given(sides, sides, sides, sides)
@settings(max_examples=30)
def test_plan_by_definition(frames: int, height: int, width: int, delay: int) -> None:
    """Guards the arithmetic of neighbours; every source is of the step before, the only states that a decoder holds."""
    delay = min(delay, width) if frames > 1 else 1
    plan = diagonal_plan(frames, height, width, delay=delay)
    cells = [(t, p, q) for t in range(frames) for p in range(height) for q in range(width)]
    number = {cell: i for i, cell in enumerate(cells)}
    assert plan.n_steps == delay * (frames - 1) + height + width - 1
    assert sorted(plan.order.tolist()) == list(range(len(cells)))
    before = [NONE] * len(cells) if plan.t_source is None else plan.t_source.tolist()
    for i, (t, p, q) in enumerate(cells):
        assert int(plan.step[i]) == delay * t + p + q
        expected = [number.get((t, p, q - 1)), number.get((t - 1, p, q + delay - 1)), number.get((t, p - 1, q))]
        left, last, up = (NONE if cell is None else int(plan.slot[cell]) for cell in expected)
        corner = i == 0
        assert int(plan.h_source[i]) == (PREFIX if corner else left)
        assert before[i] == last
        assert int(plan.v_source[i]) == (PREFIX if corner else up if up != NONE else last)
        sources = [cell for cell in expected if cell is not None]
        assert bool(sources) != corner, "every cell has a source"
        assert all(int(plan.step[cell]) == int(plan.step[i]) - 1 for cell in sources)


def test_one_frame_is_the_diagonal_plan_itself() -> None:
    assert diagonal_plan(1, 3, 4) is diagonal_plan(3, 4)
    assert diagonal_plan(3, 4).t_source is None


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("fusion", ["gate", "average", "logit_gate"])
def test_decoding_is_teacher_forcing(delay, fusion) -> None:
    """Guards cache, positions, order of the sources and both gates: every drawn code is the one that the whole model
    gives its random number."""
    model, steps = video(delay, fusion=fusion), []
    codes = Engine(model).generate(
        tiny.classes(2), GRID, "diagonal", seeds=0, cfg_scale=2.0, on_step=lambda p: steps.append(p.steps)
    )
    assert len(steps) == delay * (FRAMES - 1) + HEIGHT + WIDTH - 1
    assert misplacement(model, codes, tiny.classes(2), "diagonal", cfg_scale=2.0, seeds=0).max() < 1e-9


def test_greedy_codes_are_those_of_the_whole_model() -> None:
    """Guards against a mask that lets a cell see its own step: then teacher forcing would choose other codes."""
    model = video()
    for plan in (diagonal_plan(FRAMES, HEIGHT, WIDTH), raster_plan(*GRID)):
        drawn = generate(model, tiny.classes(2), GRID, plan.name, greedy=True)
        assert torch.equal(model(drawn, tiny.classes(2), plan).fused.argmax(-1), drawn)


@torch.no_grad()
def test_both_heads_mix_three_states() -> None:
    """Guards the fusion: by cell, g H(left) + (1 - g) (s V(above) + (1 - s) V(before)), one alone where it is alone."""
    model, plan = video(), diagonal_plan(FRAMES, HEIGHT, WIDTH)
    codes, head = tiny.codes(1, *GRID), model.dual_head
    h, v = (states[0] for states in model.teacher_forced(codes, tiny.classes(1), plan, plan.n_slots))
    fused = model(codes, tiny.classes(1), plan).fused.flatten(0, 2)
    for i in range(plan.n_cells):
        t, p, q = i // (HEIGHT * WIDTH), i // WIDTH % HEIGHT, i % WIDTH
        up = v[int(plan.slot[i - WIDTH]) + 1, : h.shape[1]] if p else None
        last = v[int(plan.slot[i - HEIGHT * WIDTH]) + 1, h.shape[1] :] if t else None
        down = last if up is None else up
        if up is not None and last is not None:
            s = head.time_gate(up, last)
            down = s * up + (1 - s) * last
        left = h[int(plan.slot[i - 1]) + 1 if q else 0] if q or down is None else None
        logits = [None if x is None else head_of(x) for head_of, x in ((head.horizontal, left), (head.vertical, down))]
        g = head.gate(left, down) if left is not None and down is not None else float(left is not None)
        expected = sum(w * z for w, z in zip((g, 1 - g), logits, strict=True) if z is not None)
        assert torch.allclose(fused[i], expected, atol=1e-12)


@pytest.mark.parametrize("delay", [1, 2])
def test_loss_is_that_of_the_logits_and_reaches_every_part(delay) -> None:
    """Guards the chunked loss under a video's order of targets, and that one step moves all three branches."""
    model = video(delay).train()
    codes, ids = tiny.codes(2, *GRID), tiny.classes(2)
    losses = model.eval().loss(codes, ids)
    nll = -model(codes, ids).fused.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    assert torch.allclose(losses["nll"], nll.flatten(1).sum(1), atol=1e-10)
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone.") or name.startswith("backbone.blocks"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    roles = model.roles()
    assert {roles[name] for name in roles if name.startswith("temporal.")} == {"vertical"}
    assert {roles[name] for name in roles if "time_gate" in name} == {"gate"}


def test_before_training_every_branch_is_the_horizontal_one() -> None:
    """Guards the cloning: training-free decoding along diagonals of all frames."""
    model = FlashAR(tiny.backbone(), 1, video={"frames": FRAMES}).eval()
    codes, plan = tiny.codes(1, *GRID), diagonal_plan(FRAMES, HEIGHT, WIDTH)
    h, v = model.teacher_forced(codes, tiny.classes(1), plan, plan.n_slots)
    assert torch.equal(v, torch.cat([h, h], dim=-1))


def test_wrong_plans_and_grids_are_refused() -> None:
    """Guards the border: a grid without whole frames, the other kind of plan, and options that have no meaning."""
    codes, ids = tiny.codes(1, 4, 3), tiny.classes(1)
    with pytest.raises(ValueError, match=r"4x3, and the model draws videos of 3 frames.*multiple of 3 rows"):
        video().loss(codes, ids)
    with pytest.raises(ValueError, match="has 1 frames, and the model was made for 3"):
        video().loss(codes, ids, diagonal_plan(4, 3))
    with pytest.raises(ValueError, match="has 2 frames, and the model was made for 1"):
        tiny.flashar().loss(codes, ids, diagonal_plan(2, 2, 3))
    with pytest.raises(ValueError, match="delay is 5; expected 1 to the width 4"):
        diagonal_plan(FRAMES, HEIGHT, WIDTH, delay=5)
    with pytest.raises(ValueError, match="there is no official format"):
        FlashAR(tiny.backbone(), 2, 1, "average", "fused", video={"frames": 2}).to_nar()
    with pytest.raises(ValueError, match="1 frames, delay 1; expected 2 frames or more"):
        FlashAR(tiny.backbone(), 1, video={"frames": 1})
    with pytest.raises(ValueError, match=r"model.flashar.video: 2 frames, delay 0"):
        VideoConfig(2, 0)
    with pytest.raises(ValueError, match="intra and video"):
        video(intra={"groups": 2})
