"""Training on a pretended GPU: the numbers of the CPU, devices not mixed, no step that waits for the device."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_gpu import CUDA, PretendGPU
from torch import Tensor
from training_toys import (
    NOT_REPEATED,
    OptimiserConfig,
    ValidationConfig,
    fit,
    make_module,
    save_classifier,
    write_digit_like,
)

from flashar_pl.backbones.condition import Batch, Condition, Prompts
from flashar_pl.models import RasterAR
from flashar_pl.models.base import STAGE1_ROLES, GridModel
from flashar_pl.training.finite import NotFinite


class Anywhere(CPUAccelerator):
    """Accepts any device."""

    def setup_device(self, device: torch.device) -> None:
        pass


class Steps(Callback):
    """What has waited between the start and the end of a training step."""

    def __init__(self, gpu: PretendGPU) -> None:
        self.gpu, self.found, self.steps = gpu, list[str](), 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.before = len(self.gpu.waits)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert pl_module.net.device == pl_module.ema.device == CUDA  # they return to the CPU after the fit
        self.steps += 1
        if self.steps > 1:  # the first copies the plan
            self.found += self.gpu.waits[self.before :]


@pytest.mark.parametrize(
    ("flashar", "moments", "precision"), [(False, "bf16", "32-true"), (True, "fp32", "bf16-mixed")]
)
def test_a_whole_fit(flashar: bool, moments: Any, precision: str, tmp_path: Path) -> None:
    """Both stages, averaged weights, validation with samples, FID and the map of the gate."""
    shards = write_digit_like(tmp_path / "shards")
    validation = ValidationConfig(
        samples=6, grid_images=2, sample_batch=4, features=save_classifier(tmp_path / "classifier"), cfg_scale=2.0
    )
    options: dict[str, Any] = {
        "ema_decay": 0.9, "validation": validation, "optimiser": OptimiserConfig(lr=1e-2, state=moments),
    }  # fmt: skip
    run: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 2, "val_check_interval": 4, "precision": precision}
    on_cpu = fit(tmp_path / "cpu", shards, make_module(flashar, **options), **run)
    with PretendGPU() as gpu:
        steps = Steps(gpu)
        strategy = SingleDeviceStrategy(CUDA, accelerator=Anywhere())
        run = {**run, "accelerator": "auto", "devices": "auto", "strategy": strategy, "callbacks": [steps]}
        on_gpu = fit(tmp_path / "gpu", shards, make_module(flashar, **options), **run)
        assert steps.steps == 4
        assert not steps.found
        for name, value in on_cpu.trainer.callback_metrics.items():
            if name not in NOT_REPEATED:
                torch.testing.assert_close(on_gpu.trainer.callback_metrics[name].cpu(), value, atol=1e-3, rtol=1e-2)


def test_a_step_that_is_not_finite_is_found_when_the_host_waits_anyway(tmp_path: Path) -> None:
    """Its step and samples are named later, and the checkpoint before it stays."""

    class Breaks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 3:
                pl_module.net.dual_head.vertical.weight.grad.mul_(torch.inf)

    shards = write_digit_like(tmp_path / "shards")
    save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=3, enable_version_counter=False)
    with PretendGPU(), pytest.raises(NotFinite, match=r"^step 4: a loss .* samples \d+, .* seen after step 6"):
        fit(
            tmp_path, shards, callbacks=[Breaks(), save], accelerator="auto", devices="auto", enable_checkpointing=True,
            strategy=SingleDeviceStrategy(CUDA, accelerator=Anywhere()),
        )  # fmt: skip
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 3


def losses_of(model: GridModel, codes: Tensor, condition: Condition, valid: Tensor) -> list[Tensor]:
    """Loss, likelihoods, and the gradients of all parameters that train, on the CPU."""
    model.zero_grad()
    losses = model.loss(codes, condition, valid=valid)
    losses["loss"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [each.detach().cpu() for each in (losses["loss"], losses["nll"], losses["gate"], *gradients)]


@pytest.mark.parametrize("kind", ["class", "text", "emu", "raster"])
@pytest.mark.parametrize("stage", [1, 2])
def test_loss_and_gradients(kind: str, stage: int) -> None:
    """Those of the CPU, with rows that only fill a batch up, dropped conditions and prompts of unequal length."""
    batch = Batch(tiny.codes(2, 3, 4), tiny.classes(2), torch.tensor([True, False]))
    model: GridModel
    if kind == "text":  # heads of 12, which are padded on a GPU
        model, batch.condition = tiny.flashar(condition="text", dim=24), tiny.captions([2, 5])
    elif kind == "emu":
        model, batch.condition = (
            tiny.emu_flashar(),
            Prompts([torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]),
        )
    else:
        model = tiny.flashar() if kind == "class" else RasterAR(tiny.backbone(condition_dropout=0.5))
    roles = model.roles()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == 2 or roles[name] in STAGE1_ROLES or kind == "raster")
    model.train(kind == "raster")
    torch.manual_seed(0)
    assert batch.valid is not None
    expected = losses_of(model, batch.codes, batch.condition, batch.valid)
    with PretendGPU() as gpu:
        model.to("cuda")
        there = batch.to("cuda")
        assert there.valid is not None
        losses_of(model, there.codes, there.condition, there.valid)  # copies the plan to the device
        torch.manual_seed(0)
        before = [wait for wait in gpu.waits if "a copy from" not in wait]
        found = losses_of(model, there.codes, there.condition, there.valid)
        new = [wait for wait in gpu.waits if "a copy from" not in wait][len(before) :]
        assert not new or kind == "emu", new  # lengths of prompts are copied
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
