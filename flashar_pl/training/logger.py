"""Curves of runs that are stopped and continue: a logger that people may interrupt, and points that are taken back.

The step of a curve, picture or text is the number of completed optimiser steps: 0 is before the first one.
"""

from __future__ import annotations

import threading
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

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


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger that lets an interrupted run end.

    Ctrl-C may fall between the lines of `threading.Condition.notify` while an event is handed to TensorBoard's writing
    thread. That thread then never wakes again, and closing the file waits for it for ever.
    """

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
