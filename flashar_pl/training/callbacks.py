"""What happens around a training step. `FlashARModule.configure_callbacks` adds these to every run.

Lightning moves ModelCheckpoint behind all other callbacks, and the module's own hooks behind that: a checkpoint holds
what callbacks did in the same step, not what hooks of the module would.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flashar_pl.backbones.condition import Batch
from flashar_pl.devices import most_memory
from flashar_pl.ranks import gather
from flashar_pl.training.logger import log_points, show_layout, take_back, tensorboards
from flashar_pl.training.meters import RunClock, epochs_done
from flashar_pl.training.optim import renew_settings
from flashar_pl.training.protocol import Trained, trained
from flashar_pl.training.steps import StepCallback, logs, validation_follows
from flashar_pl.training.strategies import allow_frozen_parameters, check_strategy
from flashar_pl.training.validation import LOSSES

LOGGED = "logged"
"""Key of the losses (4,), in the order of `LOSSES`, in what a training step returns."""


class StageSwitch(Callback):
    """Freezes and frees the roles of the model as the schedule says; the optimiser's scheduler has their rates.

    Parameters are frozen here, after a strategy has wrapped the model, and never before (see `strategies.py`).
    """

    stage: int | None = None
    """Stage that the model is set up for; None = not yet."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stage = None
        if stage != "fit":
            return
        check_strategy(trainer.strategy)
        if trained(pl_module).schedule.build(total_steps=1).freezes:
            allow_frozen_parameters(trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, planned = trained(pl_module), trainer.estimated_stepping_batches
        assert module.total_steps is not None
        if math.isfinite(planned) and planned != module.total_steps:
            idle = "; the learning rate is 0 from there on" if planned > module.total_steps else ""
            rank_zero_info(
                f"The run was started for {module.total_steps} steps and its schedule stays so; this fit stops at "
                f"{planned:.0f}{idle}."
            )
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        renew_settings(scheduler, trainer.global_step, module.optimiser)
        self._apply(trainer, module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._apply(trainer, trained(pl_module))

    def _apply(self, trainer: Trainer, module: Trained) -> None:
        schedule, step = module.built_schedule, trainer.global_step
        if schedule.stage(step) == self.stage:
            return
        self.stage = schedule.stage(step)
        names = {}
        start = "Training" if schedule.stage1_steps == 0 else f"Stage {self.stage}"
        for group in trainer.optimizers[0].param_groups:
            role, trains = group["role"], schedule.trains(group["role"], step)
            for parameter in group["params"]:
                parameter.requires_grad_(trains)
            if trains:
                names[role] = f"{role} (LoRA)" if module.lora is not None and role == "backbone" else role
        text = f"{start} at step {step} of {schedule.total_steps}: {', '.join(names.values())} train."
        rank_zero_info(text)
        for logger in tensorboards(trainer):
            logger.experiment.add_text("train/stage", text, step)


class RandomState(StepCallback):
    """Keeps every random number generator in the checkpoint, as it was after the last step, and validation away from
    them.

    A run that continues on as many ranks draws the same numbers as one that was never interrupted. On another number of
    ranks, and at the start of a run, each rank seeds its own.
    """

    _restored: list[dict[str, Any]] | None = None
    _kept: dict[str, Any] | None = None
    _after_step: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._after_step = None
        if self._restored is None and trainer.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._restored is None:
            return
        states, self._restored = self._restored, None
        same = len(states) == trainer.world_size
        set_random_state(states[trainer.global_rank if same else 0])
        if not same:
            torch.manual_seed(int(torch.randint(2**62, ())) + trainer.global_rank)

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._after_step = get_random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept = get_random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept is not None:
            set_random_state(self._kept)
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather(self._after_step or self._kept or get_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["ranks"]


def get_random_state() -> dict[str, Any]:
    """State of the generators of torch (CPU and the current CUDA device), numpy and Python, as plain types."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `get_random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class TrainingLog(StepCallback):
    """Logs the losses, the gradient norm, the learning rate of every role, the stage, speed, memory and time.

    The first step of stage 2 is logged whatever the interval, and what is 0 in every step never. The points reach the
    loggers before a checkpoint of their step is written, and a run that continues takes back what was logged after it.
    """

    def __init__(self) -> None:
        self._tokens, self._since = 0, 0.0
        self._losses: list[Tensor] = []
        """Of the batches of the step in progress, where it is logged."""
        self._points: dict[str, float] = {}
        """Of the step in progress, then of the last one."""
        self._again: dict[str, float] | None = None
        """Points of the last step while its validation is to come: it is taken back with them. None = it has been."""
        self._clock = RunClock()

    def state_dict(self) -> dict[str, Any]:
        return {"again": self._again, "clock": self._clock.read()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._again, self._clock = state_dict["again"], RunClock(**state_dict.get("clock", {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._losses = []
        take_back(trainer, trainer.global_step + (self._again is None))
        log_points(trainer, self._again or {})
        if trainer.global_step == 0:
            show_layout(trainer)
        self._clock.start(trainer.world_size)
        self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.trains(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._again = None
        self._clock.trains(True)
        self._restart()  # validation and what was done before it are not training time

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._points, step, schedule = {}, trainer.global_step, trained(pl_module).built_schedule
        if self._due(trainer, pl_module, step + 1):
            groups = [group for group in trainer.optimizers[0].param_groups if schedule.ever_trains(group["role"])]
            self._points = {f"lr/{group['role']}": float(group["lr"]) for group in groups}
            if schedule.stage1_steps > 0:
                self._points["train/stage"] = float(schedule.stage(step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(batch, Batch)
        self._tokens += batch.codes.numel() * trainer.world_size
        if self._due(trainer, pl_module, self.step + 1):
            self._losses.append(outputs[LOGGED])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._losses:  # means over the batches of the step and over all devices
            means, self._losses = torch.stack(self._losses).mean(0), []
            means = trainer.strategy.reduce(means, reduce_op="mean")
            losses = {f"train/{name}": value for name, value in zip(LOSSES, means.tolist(), strict=True)}
            if trained(pl_module).net.dual_head.vertical is None:
                del losses["train/vertical"]
            losses["train/gradient_norm"] = float(trained(pl_module).gradient_norm)
            self._points |= {name: value for name, value in losses.items() if math.isfinite(value)}  # else: left out
            speed = self._tokens / max(time.perf_counter() - self._since, 1e-9)
            self._points |= {"train/tokens_per_second": speed, "epoch": float(trainer.current_epoch)}
            self._points |= {f"train/{name}": value for name, value in self._clock.read().items()}
            if memory := most_memory(pl_module.device):
                self._points["train/memory_gib"] = memory / 2**30
            self._points["train/epochs"] = epochs_done(trainer)
            if (drawn := getattr(trainer.datamodule, "drawn", None)) is not None:  # type: ignore[attr-defined]
                self._points |= {f"data/{name}": float(n) for name, n in drawn().items()}
            self._restart()
            log_points(trainer, self._points)
            trainer.logged_metrics.update({name: torch.tensor(value) for name, value in self._points.items()})
            for name, value in self._points.items():  # for other callbacks
                pl_module.log(name, value, prog_bar=name == "train/loss", logger=False, batch_size=1)
        self._again = self._points if validation_follows(trainer) else None

    def _due(self, trainer: Trainer, module: LightningModule, step: int) -> bool:
        """Whether step `step`, counted from 1, is logged."""
        switch = trained(module).built_schedule.stage1_steps
        return logs(trainer, step) or (logs(trainer, 0) and 0 < switch == step - 1)

    def _restart(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()
