"""Tiny shards, modules and trainers for the training tests."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.shards import ConditionSpec, ShardWriter
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.training.config import BackboneConfig, FlashARConfig, OptimiserConfig, ScheduleConfig, ValidationConfig
from flashar_pl.training.module import FlashARModule

LEVELS, CLASSES, GRID = 8, 3, (4, 4)
OPTIONS: dict[str, Any] = {
    "dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": LEVELS, "num_classes": CLASSES,
}  # fmt: skip
NO_DROPOUT = {
    f"{name}_dropout": 0.0 for name in ("token", "resid", "ffn", "condition")
}  # fmt: skip
STEPS = 10
"""Length of the test runs; stage 1 has 2 of them."""


class Losses(Callback):
    """The loss of every step, over all ranks."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen[trainer.global_step] = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))


def write_digit_like(out: Path, seed: int = 0) -> str:
    """48 training, 13 validation and 7 test samples; the class shifts the codes, so there is something to learn."""
    with ShardWriter(
        out, name="toy", tokenizer={"kind": "pixels", "levels": LEVELS}, grid=GRID, vocabulary=LEVELS,
        condition=ConditionSpec("class", num_classes=CLASSES), block=4,
    ) as writer:  # fmt: skip
        random = np.random.default_rng(seed)
        for split, n in (("train", 48), ("validation", 13), ("test", 7)):
            labels = np.arange(n) % CLASSES
            ramp = np.arange(4)[None, :, None] + np.arange(4)[None, None]
            codes = (ramp + 2 * labels[:, None, None] + random.integers(0, 2, (n, *GRID))) % LEVELS
            writer.write(split, codes, ids=np.arange(n), labels=labels)
    return str(out)


def save_classifier(out: Path) -> str:
    """An untrained classifier: its features still tell images apart."""
    torch.manual_seed(3)
    return str(ClassifierFeatures(GRID, CLASSES, 6).save(out))


def make_module(flashar: bool | FlashARConfig = True, dropout: bool = True, **overrides: Any) -> FlashARModule:
    """A FlashAR (or raster) module at a learning rate that moves every weight visibly in ten steps."""
    options = OPTIONS if dropout else {**OPTIONS, **NO_DROPOUT}
    settings: dict[str, Any] = {
        "backbone": BackboneConfig(options=options),
        "flashar": FlashARConfig(branch_layer=1) if flashar is True else flashar or None,
        "optimiser": OptimiserConfig(lr=1e-2),
    }
    return FlashARModule(**{**settings, **overrides})


def make_trainer(root: Path, max_steps: int = STEPS, **overrides: Any) -> Trainer:
    """A silent single-process trainer without logger and checkpoints."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": max_steps, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
        "default_root_dir": str(root), "use_distributed_sampler": False,
    }  # fmt: skip
    warnings.filterwarnings("ignore", category=FutureWarning)
    return Trainer(**{**settings, **overrides})


def make_data(shards: Any, **overrides: Any) -> CodesDataModule:
    """Batches of 8: six an epoch."""
    return CodesDataModule(shards, **{"batch_size": 8, **overrides})


def fit(root: Path, shards: Any, module: FlashARModule | None = None, ckpt_path: Path | None = None,
        data: dict[str, Any] | None = None, **trainer: Any) -> FlashARModule:  # fmt: skip
    """Seed, fit, return the trained module."""
    seed_everything(7, verbose=False)
    module = module or make_module()
    make_trainer(root, **trainer).fit(
        module, datamodule=make_data(shards, **(data or {})), ckpt_path=ckpt_path, weights_only=ckpt_path and True
    )
    return module


NOT_REPEATED = ("train/tokens_per_second", "train/memory_gib", "train/hours", "train/device_hours")
"""Curves of the machine. All others of a run are the same points whenever it is stopped and continued."""

__all__ = [
    "CLASSES", "GRID", "LEVELS", "NOT_REPEATED", "NO_DROPOUT", "OPTIONS", "STEPS", "BackboneConfig", "FlashARConfig",
    "Losses", "OptimiserConfig", "ScheduleConfig", "ValidationConfig", "fit", "make_data", "make_module",
    "make_trainer", "save_classifier", "write_digit_like",
]  # fmt: skip
