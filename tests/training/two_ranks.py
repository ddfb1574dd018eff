"""The fit of test_two_ranks.py: across the stage switch, validated with an odd number of images and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training_toys import ValidationConfig, fit, make_data, make_module

from flashar_pl.training.predictions import join_predictions

VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 5, "check_val_every_n_epoch": None}


def module(classifier: str, **overrides):
    """No dropout: the ranks' masks would differ from those of one process."""
    config = ValidationConfig(samples=7, sample_batch=2, grid_images=3, features=classifier, cfg_scale=1.5)
    return make_module(dropout=False, ema_decay=0.5, validation=config, **overrides)


def train(shards: str, classifier: str, out: str) -> dict[str, Any]:
    """This rank's weights and results."""
    trained = fit(
        Path(out), shards, module(classifier), devices=2, data={"validation_batch_size": 4}, **VALIDATING,
    )  # fmt: skip
    trainer = trained.trainer
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(Path(out) / "end.ckpt")
    record = {"weights": trained.state_dict(), "results": results, "drawn": torch.rand(4)}
    parts = trainer.predict(trained, datamodule=make_data(shards, validation_batch_size=4))
    return record | {name: torch.from_numpy(values) for name, values in join_predictions(trainer, parts).items()}
