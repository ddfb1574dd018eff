"""Ending a run when the cluster asks for its machines back: a checkpoint at the next step, on all devices together."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flashar_pl.training.steps import StepCallback

UNFINISHED = 75
"""Exit code of a run that was asked to stop and wants to be continued (EX_TEMPFAIL)."""


class StopOnSignal(StepCallback):
    """After a signal, save `checkpoints/stopped.ckpt` at the end of the step and end the process with exit code 75.

    A signal may reach the devices at different moments, or only one of them. So the handler only takes a note, and all
    devices compare notes after every step.

    Args:
        names: signals, such as those of `#SBATCH --signal=USR1@300` and of a cancelled job.
    """

    def __init__(self, names: tuple[str, ...] = ("SIGUSR1", "SIGTERM")) -> None:
        unknown = [name for name in names if name not in signal.Signals.__members__]
        if unknown or not names:
            raise ValueError(f"names is {names!r}; expected signals, such as SIGUSR1.")
        self.names = tuple(names)
        self.asked = False
        self._before: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._before = {name: signal.signal(signal.Signals[name], self._note) for name in self.names}

    def _note(self, *_: Any) -> None:
        self.asked = True

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(f"Asked to stop at step {trainer.global_step}; continue with --ckpt_path {path}")
        raise SystemExit(UNFINISHED)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, handler in self._before.items():
            signal.signal(signal.Signals[name], handler)
        self._before = {}
