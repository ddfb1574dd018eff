"""A callback for test_emu35_chain.py: a run that stands still, so that a test can kill it at a known step."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback


class Hang(Callback):
    """Before the step HANG_AT (an environment variable), say so in a file `hanging` and wait for ever."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if os.environ.get("HANG_AT") == str(trainer.global_step):
            if trainer.is_global_zero:
                Path("hanging").touch()
            time.sleep(600)
