"""Run by test_two_devices.py: train on the given number of devices, write each device's samples, maybe resume.

python two_devices.py SHARDS OUT DEVICES MAX_STEPS [CHECKPOINT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def main(shards: str, out: str, devices: str, max_steps: str, checkpoint: str | None = None) -> None:
    module, data = Probe(), CodesDataModule(shards, batch_size=12, window=4, num_workers=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(devices),
        strategy="ddp" if devices != "1" else "auto",
        max_steps=int(max_steps),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=int(max_steps) if checkpoint is None else 1000,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    path = Path(out)
    trainer.save_checkpoint(path / f"step-{trainer.global_step}.ckpt")
    record = {"seen": module.seen, "validated": module.validated}
    (path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
