"""TensorBoard's logger for runs that people stop by hand."""

from __future__ import annotations

import threading

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
