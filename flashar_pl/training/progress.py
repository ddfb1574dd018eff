"""The progress bar of a run: optimiser steps with a time left for the whole run, and one line per validation."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from flashar_pl.models import GridModel
from flashar_pl.models.lora import frozen_names

LINE_EVERY = 30.0
"""Seconds between lines where standard error is no terminal (log files)."""


class RunProgress(ProgressBar):
    """A bar over all optimiser steps of the run, not one per epoch.

    On a terminal it is redrawn in place. Elsewhere a line is printed every half minute, with the time left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._last_line = 0.0
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._enabled:
            return
        model = getattr(pl_module, "net", pl_module)  # averaged weights are no parameters of the model
        parameters = sum(p.numel() for p in model.parameters())
        frozen = frozen_names(model) if isinstance(model, GridModel) else set()
        trained = sum(p.numel() for name, p in model.named_parameters() if name not in frozen)
        self.print(
            f"{parameters:,} parameters on {trainer.world_size} x {trainer.strategy.root_device.type}"
            + (f"; {trained:,} of them train" if frozen else "")
        )
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            total=int(total) if total != float("inf") else None,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr if sys.stderr.isatty() else _Nowhere(),
            mininterval=0.5,
        )
        self._last_line = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        self._bar.update(trainer.global_step - self._bar.n)
        now = time.monotonic()
        if sys.stderr.isatty():
            shown = self.get_metrics(trainer, pl_module)
            self._bar.set_postfix(
                {name: _number(shown[name]) for name in ("train/loss",) if name in shown}, refresh=False
            )
        elif now - self._last_line > LINE_EVERY:
            self._last_line = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Where the run stands, as one line of text."""
        state = self._bar.format_dict
        done, total, elapsed = state["n"], state["total"], state["elapsed"]
        moved = done - state["initial"]
        if not total or not moved:
            return f"step {done}"
        return f"step {done}/{total}, {elapsed / moved * (total - done):.0f} s left"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is None or trainer.sanity_checking or not self._enabled:
            return
        metrics = {k: v for k, v in trainer.callback_metrics.items() if k in SHOWN}
        if metrics:
            text = ", ".join(f"{name} {_number(metrics[name])}" for name in SHOWN if name in metrics)
            self.print(f"step {trainer.global_step}: {text}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        if self._enabled and self.trainer.is_global_zero:
            tqdm.write(" ".join(str(arg) for arg in args), file=sys.stderr)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


SHOWN = ("val/nll", "val/fid", "val/accuracy", "val/gate_mean")
"""Results of a validation that are worth a line."""


class _Nowhere:
    """A stream for tqdm where there is no terminal: the bar only keeps count."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def _number(value: Any) -> str:
    return f"{float(value):.4g}"
