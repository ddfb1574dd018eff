"""Run by test_fsdp.py in real processes: python sharded_ranks.py JSON

Every fit of the list runs in one launch; each writes its losses, and the first process what is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from training_toys import OptimiserConfig, ValidationConfig, fit, make_module

from flashar_pl.training.fsdp import ShardedStrategy

torch.set_num_threads(1)
CLIP = 0.05
"""Small enough to bite in every step."""


class Losses(Callback):
    """The loss of every step over all ranks, and the norm of the clipped gradient's parameters."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen[trainer.global_step] = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))


def strategy_of(name: str, options: dict[str, Any]) -> Any:
    return ShardedStrategy(**options) if name == "sharded" else name


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One fit; job: see the defaults taken from it."""
    root = Path(job["root"])
    losses = Losses()
    callbacks: list[Callback] = [losses]
    if job.get("save"):
        callbacks.append(ModelCheckpoint(root, filename="{step}", every_n_train_steps=job["save"], save_top_k=-1))
    module = make_module(
        dropout=False,
        optimiser=OptimiserConfig(lr=1e-2, clip=CLIP),
        ema_decay=job.get("ema"),
        init_from=job.get("init_from"),
        validation=ValidationConfig(**job.get("validation", {})),
    )
    validating = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trained = fit(
        root, job["shards"], module, ckpt_path=job.get("ckpt"), devices=job["devices"],
        strategy=strategy_of(job["strategy"], job.get("options", {})), callbacks=callbacks,
        enable_checkpointing=bool(job.get("save")), max_steps=job.get("max_steps", 10),
        data={"validation_batch_size": 4}, **(validating if job.get("validation") else {}),
    )  # fmt: skip
    weights = {name: whole(value) for name, value in trained.state_dict().items()}
    results = {name: float(value) for name, value in trained.trainer.callback_metrics.items()}
    return {"losses": losses.seen, "weights": weights, "results": results}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(text: str) -> None:
    for job in json.loads(text):
        record = run(job)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(record, Path(job["root"]) / f"{job['name']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
