"""What a run costs: hours, device-hours and epochs."""

from __future__ import annotations

import math
import time

from lightning.pytorch import Trainer


class RunClock:
    """Time of a run over all its sessions, in hours.

    Args:
        hours: what sessions before have taken by the clock, validations included.
        device_hours: what they have trained, validations left out, times the number of devices.
    """

    def __init__(self, hours: float = 0.0, device_hours: float = 0.0) -> None:
        self.hours, self.device_hours = hours, device_hours
        self._last: float | None = None
        """When the clock was read; None = it stands."""
        self._devices, self._trains = 1, True

    def start(self, devices: int) -> None:
        """A session begins."""
        self._last, self._devices, self._trains = time.perf_counter(), devices, True

    def trains(self, now: bool) -> None:
        """Training goes on or is interrupted."""
        self.read()
        self._trains = now

    def read(self) -> dict[str, float]:
        """Both hours until now."""
        if self._last is not None:
            now = time.perf_counter()
            passed, self._last = (now - self._last) / 3600, now
            self.hours += passed
            self.device_hours += passed * self._devices * self._trains
        return {"hours": self.hours, "device_hours": self.device_hours}


def epochs_done(trainer: Trainer) -> float:
    """Epochs of a fit so far, with the share of the present one where its length is known."""
    batches, loop = trainer.num_training_batches, trainer.fit_loop
    if not math.isfinite(batches) or batches < 1:
        return float(trainer.current_epoch)
    return trainer.current_epoch + (loop.batch_idx + 1) / batches
