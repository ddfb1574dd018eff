"""Ends of a run that come before its last step: the work is saved, and the run says where.

A signal may reach the devices at different moments, or only one of them. So its handler only takes a note, and all
devices compare notes after every step.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from flashar_pl.training.finite import NotFinite
from flashar_pl.training.save_point import SavePoint
from flashar_pl.training.steps import StepCallback, is_last_step, logs
from flashar_pl.training.strategies import finish_saving, saving_failed

UNFINISHED = 75
"""Exit code of a run that was asked to stop and wants to be continued (EX_TEMPFAIL)."""


USUAL = ("SIGUSR1", "SIGTERM")
"""What a scheduler sends; those that a system does not have never come."""


class Signals:
    """Handlers that are set for the time of a training."""

    def __init__(self) -> None:
        self._note: Any = None
        self._before: dict[str, Any] = {}

    def watch(self, names: Iterable[str], note: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other set handlers
        known = signal.Signals.__members__  # Windows has no SIGUSR1
        self._note = note
        self._before = {name: signal.signal(known[name], note) for name in names if name in known}

    def restore(self) -> None:
        """Put back what was there, unless somebody has: Lightning restores its own first, and not again."""
        for name, handler in self._before.items():
            if signal.getsignal(signal.Signals[name]) == self._note:
                signal.signal(signal.Signals[name], handler)
        self._before = {}


class StopOnSignal(StepCallback):
    """After a signal, save `checkpoints/stopped.ckpt` at the end of the step and end the process with exit code 75.

    Args:
        names: signals, such as those of `#SBATCH --signal=USR1@300` and of a cancelled job.
    """

    def __init__(self, names: tuple[str, ...] = USUAL) -> None:
        unknown = [name for name in names if name not in (*signal.Signals.__members__, *USUAL)]
        if unknown or not names:
            raise ValueError(f"names is {names!r}; expected signals, such as SIGUSR1.")
        self.names = tuple(names)
        self.asked = False
        self._signals = Signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signals.watch(self.names, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            save_stopped(trainer, "Asked to stop")
            raise SystemExit(UNFINISHED)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.restore()


class SaveOnStop(StepCallback):
    """Saves `checkpoints/stopped.ckpt` when a run that keeps checkpoints ends by Ctrl-C, SIGTERM or an error.

    The first signal ends the run after the step, on several GPUs after the next one that is logged; a second one, or
    with one device one outside of a step, ends it at once. What is saved is the
    state after the last whole step. An error of one device of several saves nothing: the others do not know of it.
    """

    def __init__(self, point: SavePoint) -> None:
        self.point = point
        self.asked = 0
        """Number of the signal that came; 0 = none."""
        self._signals = Signals()
        self._alone, self._together = True, False
        """Whether there is one device, and whether all devices end the run for the same reason."""
        self._ends = False
        """Whether this was the last step: the run ends by itself."""
        self._saved = 0
        """Step of the newest checkpoint that was begun, or the first of this process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.asked, self._saved, self._ends = 0, trainer.global_step, False
        self._alone, self._together = trainer.world_size == 1, False
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        taken = {name for other in others if isinstance(other, StopOnSignal) for name in other.names}
        self._signals.watch({"SIGINT", "SIGTERM"} - taken, self._note)

    def _note(self, number: int, *_: Any) -> None:
        again, self.asked = self.asked, number
        if again or (self._alone and not self.point.in_step and not self._ends):
            raise _end(number)
        rank_zero_info("The run ends after this step; a second signal ends it at once.")

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_step(trainer):
            self._ends = True
            return
        on_gpus = not self._alone and trainer.strategy.root_device.type != "cpu"
        if on_gpus and not logs(trainer, trainer.global_step):
            return  # to compare notes they wait for each other
        if trainer.strategy.reduce_boolean_decision(self.asked != 0 or saving_failed(trainer.strategy), all=False):
            self._together = True
            finish_saving(trainer.strategy)
            raise _end(self.asked or signal.SIGTERM)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        keeps = trainer.checkpoint_callbacks and not trainer.fast_dev_run  # type: ignore[attr-defined]
        saved = trainer.global_step == self._saved and not _cut_a_save(exception)
        if trainer.state.fn != TrainerFn.FITTING or not keeps or saved:
            return
        if not (self._alone or self._together or isinstance(exception, NotFinite)):
            return
        if self.point.in_update or self.point.noted is None:
            rank_zero_warn(
                f"Ended within step {trainer.global_step}: it is not saved; continue from the last checkpoint."
            )
            return
        try:
            save_stopped(trainer, f"Ended by {type(exception).__name__}")
        except (OSError, RuntimeError, ValueError) as error:
            rank_zero_warn(f"Step {trainer.global_step} could not be saved: {error}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.restore()


def save_stopped(trainer: Trainer, why: str) -> None:
    """Save the last whole step as checkpoints/stopped.ckpt of the run directory, and say how to continue."""
    path = Path(trainer.default_root_dir) / "checkpoints" / "stopped.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    finish_saving(trainer.strategy)
    rank_zero_info(f"{why} at step {trainer.global_step}; continue with --checkpoint {path}")


def _cut_a_save(exception: BaseException) -> bool:
    """Whether a signal ended a checkpoint before it was whole."""
    frames = traceback.walk_tb(exception.__traceback__)
    within = any(frame.f_code is Trainer.save_checkpoint.__code__ for frame, _ in frames)
    return within and not isinstance(exception, Exception)


def _end(number: int) -> BaseException:
    """What ends the process as the signal would have."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
