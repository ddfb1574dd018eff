"""Two real processes: the data is cut once, and a checkpoint continues on another number of devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pair import Pair
from toy_shards import write_classes

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
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=max_steps,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=max_steps if checkpoint is None else 1000,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(out / f"step-{trainer.global_step}.ckpt")
    return {"seen": module.seen, "validated": module.validated}


@pytest.mark.slow
def test_two_devices_then_one_then_two(pair: Pair, tmp_path: Path) -> None:
    """8 batches an epoch, stopped at 5 and 11 of 14; validation shows each sample once over both devices."""
    shards = write_classes(tmp_path / "toy").root
    whole = fit(shards, tmp_path, 1, 14)
    first = pair(fit, shards, tmp_path, 2, 5)
    second = fit(shards, tmp_path, 1, 11, tmp_path / "step-5.ckpt")
    third = pair(fit, shards, tmp_path, 2, 14, tmp_path / "step-11.ckpt")
    both = [[a + b for a, b in zip(*(r["seen"] for r in part), strict=True)] for part in (first, third)]
    assert both[0] + second["seen"] + both[1] == whole["seen"]
    assert sorted(first[0]["validated"] + first[1]["validated"]) == list(range(23))
