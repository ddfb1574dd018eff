"""The schedule as pure functions of the step, and the parameter groups it applies to."""

import math

import pytest
import tiny
import torch

from flashar_pl.models import RasterAR
from flashar_pl.models.base import ROLES
from flashar_pl.training.averaging import EmaUpdate
from flashar_pl.training.config import OptimiserConfig
from flashar_pl.training.optim import adamw, parameter_groups
from flashar_pl.training.sharded.compact_adamw import CompactAdamW
from flashar_pl.training.stages import Schedule, ScheduleConfig


@pytest.mark.parametrize(
    ("total", "share", "steps"),
    [(300, 0.2, 60), (10, 0.2, 2), (11, 0.2, 3), (1, 0.2, 1), (4, 0.2, 1), (25, 0.28, 7), (100, 0.28, 28), (9, 1.0, 9)],
)
def test_stage_one_is_its_share_rounded_up(total: int, share: float, steps: int) -> None:
    """0.28 * 25 is 7.000000000000001 in floating point: its ceiling is 8. Over all shares of two digits and runs up to
    20,000 steps a plain ceiling is wrong in thousands of cases."""
    schedule = Schedule(total, stage1_share=share)
    assert schedule.stage1_steps == steps
    assert [schedule.stage(s) for s in range(total)] == [1] * steps + [2] * (total - steps)


def test_stage_one_equals_exact_arithmetic() -> None:
    for percent in range(101):
        for total in (*range(1, 400), 9_999, 62_550, 1_000_000):
            assert Schedule(total, stage1_share=percent / 100).stage1_steps == -(-percent * total // 100), (
                percent,
                total,
            )


def test_factors_follow_the_paper() -> None:
    """The horizontal head is frozen in stage 1 and trains at the full rate in stage 2; the backbone at a fifth."""
    schedule = Schedule(100)
    stage1 = {role: schedule.factor(role, 1) for role in ROLES}
    assert stage1 == {"backbone": 0, "horizontal_head": 0, "vertical": 1, "vertical_head": 1, "gate": 1, "added": 1}
    stage2 = {role: schedule.factor(role, 2) for role in ROLES}
    assert stage2 == {"backbone": 0.2, "horizontal_head": 1, "vertical": 1, "vertical_head": 1, "gate": 1, "added": 1}


def test_one_cosine_spans_both_stages() -> None:
    schedule = Schedule(50)
    for step in (0, 9, 10, 25, 49):
        wanted = 3e-4 * (1 + math.cos(math.pi * step / 50)) / 2
        assert 3e-4 * schedule.scale("gate", step) == pytest.approx(wanted)
        assert 3e-4 * schedule.scale("backbone", step) == pytest.approx(0.0 if step < 10 else 0.2 * wanted)


def test_the_rate_does_not_rise_again_behind_the_end() -> None:
    assert Schedule(10).scale("gate", 10) == 0
    assert Schedule(10).scale("gate", 15) == 0


def test_warmup_starts_above_zero_and_ends_at_the_cosine() -> None:
    schedule = Schedule(100, stage1_share=0, backbone_factor=1, warmup=4)
    ratios = [
        schedule.scale("backbone", s) / Schedule(100, stage1_share=0, backbone_factor=1).scale("backbone", s)
        for s in range(6)
    ]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_raster_settings_have_one_stage() -> None:
    schedule = ScheduleConfig().resolve(raster=True).build(10)
    assert not schedule.freezes
    assert all(schedule.trains(role, 0) for role in ("backbone", "horizontal_head"))
    with pytest.raises(ValueError, match="no vertical branch"):
        ScheduleConfig(stage1_share=0.2).resolve(raster=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage1_share": 1.5}, "0 to 1"),
        ({"backbone_factor": -1}, "0 or more"),
        ({"warmup": -1}, "0 or more"),
        ({"milestones": [1.5]}, "shares of the run"),
        ({"milestones": [0.5], "floor": 0.1}, "leave per_stage and floor out"),
        ({"gamma": 0.5}, "gamma is 0.5, and there are no milestones"),
    ],
)
def test_wrong_schedules_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"total_steps": 10, **values})


@pytest.mark.parametrize("model", [tiny.flashar(), tiny.flashar(m=2, fusion="average"), RasterAR(tiny.backbone())])
def test_groups_are_disjoint_and_exhaustive(model) -> None:
    """A parameter in no group would never train, one in two groups would train twice."""
    groups = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values())
    roles = model.roles()
    for group in groups:
        assert {roles[names[id(p)]] for p in group["params"]} == {group["role"]}
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_order_of_groups_is_fixed() -> None:
    """Optimiser states are stored by position: another order would give a parameter the moments of another."""
    first, second = (parameter_groups(tiny.flashar(), 0.05) for _ in range(2))
    assert [(g["role"], [p.shape for p in g["params"]]) for g in first] == [
        (g["role"], [p.shape for p in g["params"]]) for g in second
    ]


def test_the_moments_asked_for_are_the_ones_kept() -> None:
    """A run of 34B parameters that asks for bfloat16 moments has no memory for others."""
    kinds = [type(adamw(tiny.flashar(), OptimiserConfig(state=state))) for state in ("fp32", "bf16")]
    assert kinds == [torch.optim.AdamW, CompactAdamW]


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        adamw(tiny.flashar().to(torch.bfloat16), OptimiserConfig())


def test_defaults_and_whether_anything_is_frozen() -> None:
    assert Schedule(10).scale("gate", 0) == 1.0, "no warm-up unless asked for"
    frozen = {
        (share, factor): Schedule(10, stage1_share=share, backbone_factor=factor).freezes
        for share in (0.0, 0.2)
        for factor in (0.0, 0.2)
    }
    assert frozen == {(0.0, 0.0): True, (0.0, 0.2): False, (0.2, 0.0): True, (0.2, 0.2): True}


def test_a_role_trains_ever_or_never() -> None:
    """Guards a rate that is drawn for parameters that no stage moves, and one that is missing for the branch."""
    schedule = Schedule(100, backbone_factor=0.0)
    assert [role for role in ROLES if not schedule.ever_trains(role)] == ["backbone"]
    assert all(Schedule(100).ever_trains(role) for role in ROLES)


def test_the_authors_schedule_ends_each_stage_at_its_floor() -> None:
    """Their default.json: 20,000 steps, 5 % in stage 1; flat parts of 500 and 2,000 steps; 0.35 of the rate in stage 2,
    and a floor of 5 % of the heads' rate for the backbone too."""
    flat = {"flat_stage1": 500, "flat_stage2": 2000}
    schedule = Schedule(20000, stage1_share=0.05, per_stage=True, floor=0.05, stage2_rate=0.35, **flat)
    lr = lambda role, step: 5e-5 * schedule.scale(role, step)  # noqa: E731
    assert {lr("gate", step) for step in (0, 250, 500)} == {5e-5}
    assert lr("gate", 999) == pytest.approx(2.5e-6, rel=1e-3)
    assert lr("backbone", 999) == 0
    for role, top in (("gate", 1.75e-5), ("backbone", 3.5e-6)):
        assert lr(role, 1000) == lr(role, 3000) == pytest.approx(top)
        assert lr(role, 11500) == pytest.approx((top + 8.75e-7) / 2)
        assert lr(role, 20000) == pytest.approx(8.75e-7)


def test_milestones_take_the_place_of_the_cosine() -> None:
    """Their LlamaGen code: 30 epochs of 2,500 steps, 0.2 of the rate behind 15, 20 and 25."""
    schedule = Schedule(75000, stage1_share=0.0, backbone_factor=1.0, milestones=[1 / 2, 2 / 3, 5 / 6], gamma=0.2)
    for step, rate in (
        (0, 1.0),
        (37499, 1.0),
        (37500, 0.2),
        (50000, 0.04),
        (62499, 0.04),
        (62500, 0.008),
        (75000, 0.008),
    ):
        assert schedule.scale("backbone", step) == schedule.scale("gate", step) == pytest.approx(rate)


def test_vectors_decay_where_asked() -> None:
    groups = parameter_groups(tiny.flashar(), 0.01, decay_vectors=True)
    assert {group["weight_decay"] for group in groups} == {0.01}


def test_a_decay_of_averages_is_a_share() -> None:
    """0, the newest weights alone, is one."""
    assert EmaUpdate(0.0).decay == 0
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ema_decay is"):
            EmaUpdate(decay)
