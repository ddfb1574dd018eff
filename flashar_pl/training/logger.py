"""Curves of runs that are stopped and continue: a logger that people may interrupt, and points that are taken back.

The step of a curve, picture or text is the number of completed optimiser steps: 0 is before the first one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from flashar_pl.files import naming_full_disk, patiently

PATIENCE = 10.0
"""Seconds that a run which did not end by itself waits for its last events to be written."""
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "run": {
        "training losses (Eq. 8-10)": ["Multiline", ["train/fused", "train/horizontal", "train/vertical"]],
        "held-out losses": ["Multiline", ["val/fused", "val/horizontal", "val/vertical"]],
        "held-out likelihood, nats per image": ["Multiline", ["val/nll"]],
        "FID": ["Multiline", ["val/fid"]],
        "class accuracy": ["Multiline", ["val/accuracy"]],
        "gate: weight of the horizontal head, entropy": ["Multiline", ["val/gate_mean", "val/gate_entropy"]],
        "learning rates": ["Multiline", ["lr/.*"]],
        "stage": ["Multiline", ["train/stage"]],
        "gradient norm before clipping": ["Multiline", ["train/gradient_norm"]],
        "tokens per second": ["Multiline", ["train/tokens_per_second"]],
        "peak memory, GiB": ["Multiline", ["train/memory_gib"]],
    }
}
"""Charts of TensorBoard's tab "custom scalars"; a name is a regular expression."""
RESULTS = ("val/nll", "val/fid", "val/is", "val/accuracy", "val/gate_mean", "train/loss")
"""What TensorBoard's tab "hparams" shows beside the settings of a run: the last value of each."""


class PatientFiles:
    """TensorBoard's local files, written as patiently as checkpoints while the disk is full.

    Its writing thread ends with the first error, with a traceback, and leaves half a record, behind which no reader
    looks. Here half a record is cut off, and an error that stays is kept in `problem`; nothing is written after it.
    """

    problem: OSError | None = None

    def __init__(self, local: Any) -> None:
        self.local = local

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def write(self, filename: Any, content: Any, binary_mode: bool = False) -> None:
        self._write(self.local.write, Path(os.fsdecode(filename)), content, binary_mode, kept=0)

    def append(self, filename: Any, content: Any, binary_mode: bool = False) -> None:
        path = Path(os.fsdecode(filename))
        self._write(self.local.append, path, content, binary_mode, kept=path.stat().st_size)

    def _write(self, how: Callable[..., object], path: Path, content: Any, binary_mode: bool, kept: int) -> None:
        def write() -> None:
            try:
                with naming_full_disk(path):
                    how(str(path), content, binary_mode)
            except OSError:
                with suppress(OSError):
                    os.truncate(path, kept)
                raise

        if self.problem is None:
            try:
                patiently(write)
            except OSError as error:
                self.problem = error


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger that waits while the disk is full, and lets an interrupted run end.

    Ctrl-C may fall between the lines of `threading.Condition.notify` while an event is handed to TensorBoard's writing
    thread. That thread then never wakes again, and closing the file waits for it for ever.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        from tensorboard.compat.tensorflow_stub.io.gfile import get_filesystem, register_filesystem

        super().__init__(*args, **options)
        local = get_filesystem("")
        self.files = PatientFiles(local.local if isinstance(local, PatientFiles) else local)
        register_filesystem("", self.files)

    def save(self) -> None:
        """Raises OSError where the curves could not be written."""
        super().save()
        if self.files.problem is not None:
            raise self.files.problem

    def finalize(self, status: str) -> None:
        if status == "success":
            super().finalize(status)
            return
        closing = threading.Thread(target=super().finalize, args=(status,), daemon=True)
        closing.start()
        closing.join(PATIENCE)


def log_points(trainer: Trainer, points: dict[str, float]) -> None:
    """Hand the points of the present step to all loggers, and let them write."""
    for logger in trainer.loggers if points else ():
        logger.log_metrics(points, step=trainer.global_step)
        logger.save()


def take_back(trainer: Trainer, step: int) -> None:
    """Let TensorBoard forget the points of step `step` and later ones: they are logged anew. It was made to: a file
    that says where its session starts overrides the files before it."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for logger in tensorboards(trainer):
        logger.experiment.flush()
        start = Event(session_log=SessionLog(status=SessionLog.START))
        logger.experiment.file_writer.add_event(start, step=step)
        logger.save()


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that take whatever TensorBoard shows; none on other ranks than the first."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def show_layout(trainer: Trainer) -> None:
    """Charts that belong together, once for a run: TensorBoard keeps what stands at step 0."""
    for logger in tensorboards(trainer):
        logger.experiment.add_custom_scalars(LAYOUT)


def show_settings(trainer: Trainer, text: str, settings: dict[str, Any]) -> None:
    """The configuration of a run as text, and its single values beside its results.

    text: YAML. settings: of dotted names; other values than numbers, truth values and words are left out.
    """
    from torch.utils.tensorboard.summary import hparams

    values = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    for logger in tensorboards(trainer):
        block = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown's way to keep lines
        logger.experiment.add_text("config", block, 0)  # there it is never taken back
        for summary in hparams(values, dict.fromkeys(RESULTS, 0.0)):
            logger.experiment.file_writer.add_summary(summary)
        logger.save()
