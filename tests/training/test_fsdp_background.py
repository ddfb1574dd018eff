"""Sharded checkpoints that are written while training goes on."""

import errno
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pair import Pair
from sharded_ranks import Hold, record, run_all
from training_toys import make_data, make_module, make_trainer

from flashar_pl.checkpoints.sharded import read_meta
from flashar_pl.checkpoints.verify import verify
from flashar_pl.training.sharded.background import Background, host_copy
from flashar_pl.training.sharded.strategy import ShardedStrategy


def fit(root: Path, shards: str, *callbacks: Callback, **options: Any) -> Trainer:
    """A training of five steps on one device, saved as last.ckpt after each two, or as `options` say."""
    save = ModelCheckpoint(
        root, **{"filename": "last", "every_n_train_steps": 2, "enable_version_counter": False} | options
    )
    trainer = make_trainer(
        root, max_steps=5, strategy=ShardedStrategy("fp32", background=True), callbacks=[*callbacks, save],
        enable_checkpointing=True,
    )  # fmt: skip
    trainer.fit(make_module(), datamodule=make_data(shards))
    return trainer


def steps(root: Path) -> dict[str, int]:
    """Step of every checkpoint; all of them are whole."""
    found = list(root.glob("*.ckpt"))
    assert all("have their CRC-32s" in verify(path) for path in found)
    return {path.name: read_meta(path)["global_step"] for path in found}


@pytest.mark.slow
def test_two_ranks_continue_from_it_bit_for_bit(pair: Pair, toy_shards: str, tmp_path: Path) -> None:
    """Written three steps and the switch of stages later: whatever still was the trained tensor itself would differ."""
    job = {"root": str(tmp_path), "shards": toy_shards, "strategy": "sharded", "ema": 0.5}
    whole = {**job, "name": "whole", "options": {"compute": "fp32"}}
    held = {**job, "name": "held", "options": {"compute": "fp32", "background": True}, "save": 2, "hold": 3}
    again = {**whole, "name": "again", "ckpt": f"{tmp_path}/step=2.ckpt"}
    pair(run_all, [whole, held, again])
    wanted = record(whole)["weights"]
    for job in (held, again):
        found = record(job)["weights"]
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert steps(tmp_path) == {f"step={step}.ckpt": step for step in (2, 4, 6, 8, 10)}


def test_the_name_moves_when_the_new_one_is_whole(toy_shards: str, tmp_path: Path) -> None:
    """A training that is killed while it writes has the checkpoint before."""
    fit(tmp_path, toy_shards)
    assert steps(tmp_path) == {"last.ckpt": 5}
    hold = Hold(3, tmp_path)
    fit(tmp_path, toy_shards, hold)
    assert hold.seen == {"last.ckpt": 5}  # of the training before: that of step 2 is being written
    assert steps(tmp_path) == {"last.ckpt": 5}
    assert not list(tmp_path.glob(".last*"))


class Seen(Hold):
    """Holds the second checkpoint only: of step 4, until the end."""

    def hold(self, *arguments: Any, **named: Any) -> None:
        if list(self.folder.glob("*.ckpt")):
            super().hold(*arguments, **named)
        else:
            self.save(*arguments, **named)

    def on_train_end(self, trainer, pl_module) -> None:
        self.seen = {path.name for path in self.folder.glob("*.ckpt")}
        self.ended.set()


def test_the_old_one_goes_when_the_new_one_is_whole(toy_shards: str, tmp_path: Path) -> None:
    """ModelCheckpoint removes the one before as soon as the next is said to be saved."""
    seen = Seen(9, tmp_path)
    fit(tmp_path, toy_shards, seen, filename="{step}")
    assert seen.seen == {"step=2.ckpt"}
    assert steps(tmp_path) == {"step=4.ckpt": 4, "step=5.ckpt": 5}  # LastCheckpoint's is not counted by ModelCheckpoint


class Fails(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(143)])
def test_every_end_waits_for_it(toy_shards: str, tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fit(tmp_path, toy_shards, Hold(9, tmp_path), Fails(error))
    assert steps(tmp_path) == {"last.ckpt": 2}


def test_a_full_disk_ends_the_training_in_one_line(toy_shards: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """After the pauses; the old checkpoint stays. The copy goes before the last step is copied: both had been held."""
    fit(tmp_path, toy_shards)
    copies, held = list[weakref.ref[torch.Tensor]](), []

    def full(tensors: Any, checkpoint_id: Path, **_: Any) -> None:
        copies.append(weakref.ref(next(iter(tensors.values()))))
        held.append(len({id(each()) for each in copies if each() is not None}))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flashar_pl.files.WAITS", (0,))
    monkeypatch.setattr("flashar_pl.checkpoints.sharded.dcp.save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*last.ckpt'$"):
        fit(tmp_path, toy_shards)
    assert "last.ckpt'; trying again in 0 s." in capsys.readouterr().err
    assert held == [1, 1, 1, 1]
    assert steps(tmp_path) == {"last.ckpt": 5}
    assert not list(tmp_path.glob(".last*"))


def test_a_link_to_what_is_not_there_yet_is_refused(toy_shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_last is link"):
        fit(tmp_path, toy_shards, save_last="link")


def test_copies_share_nothing() -> None:
    """torchao's `to` with copy=True gives a tensor of the same codes on a CPU."""
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    moment = subclass.OptimState8bit.zeros((64, 64), signed=True)
    copy = host_copy(moment)
    moment.codes.fill_(7)
    moment.scale.fill_(2)
    assert not copy.codes.any()
    assert not copy.scale.eq(2).any()
    weight = torch.zeros(3)
    copy = host_copy(weight)
    weight.fill_(1)
    assert not copy.any()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group."""
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda _: None)


def test_the_thread_is_on_the_device_of_its_process(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was on the first GPU, where the writer of every process of a machine asked for a stream."""
    places: dict[str, torch.device] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: places.update({threading.current_thread().name: at}))
    background = Background(timedelta(minutes=1), torch.device("cuda", 3))
    background.begin(lambda: None)
    background.finish()
    background.close()
    assert places == {"checkpoint_0": torch.device("cuda", 3)}
