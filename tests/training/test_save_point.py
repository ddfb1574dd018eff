"""What a kill leaves behind continues to the same weights and the same curves, whenever it comes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.summary.writer import event_file_writer
from training_toys import NOT_REPEATED, fit, make_module

from flashar_pl.training.config import ValidationConfig
from flashar_pl.training.logger import RunLogger

event_file_writer._global_uid = event_file_writer.AtomicCounter(10000)
"""TensorBoard reads files in the order of their names: of two that a process makes in one second, 9 comes after 10."""
RUN = {
    "accumulate_grad_batches": 2, "max_steps": 7, "limit_val_batches": 1.0, "val_check_interval": 2,
    "check_val_every_n_epoch": None, "log_every_n_steps": 1, "enable_checkpointing": True,
}  # fmt: skip
"""Six batches an epoch: three steps. Validations after steps 2, 4 and 6."""


class Kills(Callback):
    """Copies of the run directory as it is at some moments: what a kill would leave."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out

    def take(self, name: str) -> None:
        shutil.copytree(self.root, self.out / name)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.take(f"batch_{trainer.fit_loop.total_batch_idx}")

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.take(f"validation_{trainer.global_step}")


def run(root: Path, shards: str, callbacks: tuple[Callback, ...] = (), start: Path | None = None, every: int = 1):
    save = ModelCheckpoint(root / "checkpoints", filename="last", every_n_train_steps=every)
    save._enable_version_counter = False
    module = make_module(ema_decay=0.5, validation=ValidationConfig(grid_images=1))
    logger = RunLogger(str(root), name="", version="")
    return fit(root, shards, module, start, callbacks=[*callbacks, save], logger=logger, **RUN)


def curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    """All points; pictures as their step alone, and no speeds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in NOT_REPEATED:
        del scalars[tag]
    return scalars | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.fixture(scope="module", params=[2, 3, pytest.param(1, marks=pytest.mark.slow)])
def whole(request, tmp_path_factory, toy_shards: str):
    """(out, module, curves, interval of checkpoints) of a run that is not killed; `out` has what kills would leave."""
    root, out = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    module = run(root, toy_shards, (Kills(root, out),), every=request.param)
    return out, module, curves(root), request.param


@pytest.mark.parametrize(
    "moment",
    [
        "batch_7",
        "validation_6",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("batch_6", "batch_12", "validation_4")),
    ],
)
def test_a_killed_run_equals_one_that_was_not(whole, toy_shards: str, tmp_path: Path, moment: str) -> None:
    """Between the batches of a step, at an epoch's end, in a validation at a checkpoint's step or after it.

    Lightning saves again between the batches of a step, loses the points of the step, and takes a validation that was
    due for done.
    """
    out, module, points, every = whole
    root = tmp_path / "run"
    shutil.copytree(out / moment, root)
    continued = run(root, toy_shards, (), root / "checkpoints" / "last.ckpt", every)
    for (name, a), b in zip(module.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert continued.trainer.fit_loop.state_dict() == module.trainer.fit_loop.state_dict()
    assert curves(root) == points
    assert {name: [step for step, _ in seen] for name, seen in points.items()}["val/nll"] == [2, 4, 6]


def test_a_validation_that_was_due_is_counted_once(toy_shards: str, tmp_path: Path) -> None:
    """Within an epoch, a run that continued with it counted its first batch twice."""

    def three_steps(start: Path | None = None) -> Any:
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"val_check_interval": 2, "limit_val_batches": 1, "enable_checkpointing": True, "max_steps": 3}
        return fit(tmp_path, toy_shards, None, start, callbacks=[save], **options).trainer.fit_loop.state_dict()

    whole = three_steps()
    assert three_steps(tmp_path / "step=2.ckpt") == whole
