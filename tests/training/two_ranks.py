"""Run by test_two_ranks.py in real processes: python two_ranks.py SHARDS CLASSIFIER OUT [CHECKPOINT]

Trains across the stage switch on two gloo ranks, validates with an odd number of images and samples, and writes each
rank's weights and results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from training_toys import ValidationConfig, fit, make_module

torch.set_num_threads(1)
VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 5, "check_val_every_n_epoch": None}


def module(classifier: str, **overrides):
    """No dropout: the ranks' masks would differ from those of one process."""
    config = ValidationConfig(samples=7, sample_batch=2, grid_images=3, features=classifier, cfg_scale=1.5)
    return make_module(dropout=False, ema_decay=0.5, validation=config, **overrides)


def main(shards: str, classifier: str, out: str, checkpoint: str | None = None) -> None:
    path = Path(out)
    trained = fit(
        path, shards, module(classifier), devices=2, ckpt_path=Path(checkpoint) if checkpoint else None,
        data={"validation_batch_size": 4}, **VALIDATING,
    )  # fmt: skip
    trainer = trained.trainer
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    record = {"weights": trained.state_dict(), "results": results, "drawn": torch.rand(4)}
    trainer.save_checkpoint(path / "end.ckpt")
    torch.save(record, path / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
