"""The fit of test_two_devices.py: each device notes the samples it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from flashar_pl.data.datamodules import CodesDataModule


class Probe(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 1)
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.index.tolist())
        return self.layer(batch.codes.flatten(1) / 300).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.index[batch.valid].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(shards: str, out: Path, devices: int, max_steps: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Samples of every training batch and of validation, on this device; saves OUT/step-N.ckpt."""
    module, data = Probe(), CodesDataModule(shards, batch_size=12, window=4, num_workers=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=max_steps if checkpoint is None else 1000,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(out / f"step-{trainer.global_step}.ckpt")
    return {"seen": module.seen, "validated": module.validated}
