"""Curves of runs that are stopped and continue: a logger that people may interrupt, and points that are taken back."""

from __future__ import annotations

import threading

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

PATIENCE = 10.0
"""Seconds that a run which did not end by itself waits for its last events to be written."""


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
    """Hand the points of optimiser step `trainer.global_step` to all loggers, and let them write. Steps of curves are
    counted from 0, as Lightning does."""
    for logger in trainer.loggers if points else ():
        logger.log_metrics(points, step=trainer.global_step - 1)
        logger.save()


def take_back(trainer: Trainer, step: int) -> None:
    """Let TensorBoard forget the points of step `step`, counted from 0, and later ones: they are logged anew. It was
    made to: a file that says where its session starts overrides the files before it."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            logger.experiment.flush()
            start = Event(session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start, step=step)
            logger.save()
