"""What a run would leave out without a word is said before it starts."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_toys import fit, make_module

from flashar_pl.training.checks import first_validation, idle_parts
from flashar_pl.training.config import FlashARConfig, IntraConfig, ScheduleConfig
from flashar_pl.training.stages import Schedule


def trainer(**overrides: Any) -> Any:
    """The settings of a Trainer with epochs of 6 batches."""
    usual = {"val_check_interval": 1.0, "val_check_batch": 6, "check_val_every_n_epoch": 1, "num_training_batches": 6}
    others = {"accumulate_grad_batches": 1, "enable_validation": True, "fast_dev_run": False}
    return SimpleNamespace(**{**usual, **others, **overrides})


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 6),
        ({"check_val_every_n_epoch": 3}, 18),
        ({"check_val_every_n_epoch": 2, "val_check_batch": 2}, 8),
        ({"check_val_every_n_epoch": None, "val_check_batch": 500}, 500),
        ({"enable_validation": False}, None),
        ({"fast_dev_run": True}, None),
        ({"val_check_batch": None}, None),
    ],
)
def test_the_first_validation(settings: dict[str, Any], first: int | None) -> None:
    assert first_validation(trainer(**settings)) == first


def test_what_is_said() -> None:
    """Guards silence, and warnings about runs that are as they should be."""
    roles = ["backbone", "vertical", "gate", "horizontal_head"]
    assert idle_parts(trainer(), Schedule(6), roles) == []
    [note] = idle_parts(trainer(check_val_every_n_epoch=None, val_check_batch=500), Schedule(40), roles)
    assert "no validation: the first would come after batch 500, the run has 40" in note
    assert idle_parts(trainer(accumulate_grad_batches=3), Schedule(2), ["gate"]) == []
    [note] = idle_parts(trainer(), Schedule(6, stage1_share=1.0), roles)
    assert "the learning rate of backbone, horizontal_head is 0 in all 6 steps: schedule.stage1_share is 1.0" in note
    [note] = idle_parts(trainer(), Schedule(6, backbone_factor=0.0), roles)
    assert "the learning rate of backbone is 0" in note
    [note] = idle_parts(trainer(), Schedule(6, warmup=7), roles)
    assert "schedule.warmup is 7 steps, the run has 6" in note


def test_a_fit_says_it_before_its_first_step(tmp_path: Path, toy_shards: str) -> None:
    module = make_module(schedule=ScheduleConfig(stage1_share=1.0))
    with pytest.warns(UserWarning, match=r"no validation: .* batch 6, the run has 1\.") as said:
        fit(tmp_path, toy_shards, module, max_steps=1, limit_val_batches=1)
    assert any("is 0 in all 1 steps" in str(each.message) for each in said)
    with warnings.catch_warnings(record=True) as silent:
        warnings.simplefilter("always")
        fit(tmp_path, toy_shards, make_module(), max_steps=6, limit_val_batches=1)
    assert not [each for each in silent if "no validation" in str(each.message) or "is 0 in all" in str(each.message)]


def test_an_intra_diagonal_head_that_would_train_nothing_is_refused() -> None:
    """Guards groups of 1, whose head no loss reaches, and a head that trains alone beside random weights."""
    refused: Any = (
        ({"groups": 1}, "groups is 1, which is off"),
        ({"groups": 3}, "model.flashar.intra.groups is 3; expected 1"),
        ({"alone": True}, "would stay random"),
    )
    for intra, message in refused:
        with pytest.raises(ValueError, match=message):
            make_module(flashar=FlashARConfig(1, intra=IntraConfig(**intra)))
