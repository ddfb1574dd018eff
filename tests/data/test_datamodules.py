"""The DataModule inside a real Trainer: exact resume in mid-epoch, and errors before training."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_shards import write_classes

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.shards import Manifest

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Manifest:
    return write_classes(tmp_path_factory.mktemp("data") / "toy", crops=2)


class Probe(LightningModule):
    """Records the samples it sees; its weights depend on every batch and on dropout."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 1)
        self.fail_at = fail_at
        self.seen: list[tuple[int, list[int], int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append((self.current_epoch, batch.index.tolist(), int(batch.codes.sum())))
        x = torch.nn.functional.dropout(batch.codes.flatten(1) / 300, 0.5)
        return self.layer(x).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.index[batch.valid].tolist()

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class SaveRandomState(Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        self.loaded = checkpoint["random"]

    def on_train_start(self, trainer, module) -> None:
        if hasattr(self, "loaded"):
            torch.set_rng_state(self.loaded)


def trainer_for(directory: Path, *callbacks: Callback, **kwargs) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": directory,
    }
    return Trainer(callbacks=[SaveRandomState(), *callbacks], **(settings | kwargs))


def fit(toy: Manifest, directory: Path, *callbacks: Callback, ckpt=None, workers: int = 0, fail_at=None, **kwargs):
    torch.manual_seed(0)
    module = Probe(fail_at)
    data = CodesDataModule(toy.root, batch_size=12, num_workers=workers, window=4, seed=5)
    trainer = trainer_for(directory, *callbacks, **kwargs)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


@pytest.fixture(scope="module")
def whole(toy: Manifest, tmp_path_factory) -> Probe:
    return fit(toy, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("stop", "workers"), [(3, 2), (8, 0), (13, 1), (20, 0)])
def test_resume_through_a_checkpoint_is_exact(toy, whole, tmp_path, stop: int, workers: int) -> None:
    """8 batches an epoch: in mid-epoch, at an epoch's end, and with another number of workers afterwards."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    part = fit(toy, tmp_path, saver, workers=workers, max_steps=stop, max_epochs=-1)
    rest = fit(toy, tmp_path, ckpt=tmp_path / f"step={stop}.ckpt")
    assert len(whole.seen) == 24
    assert part.seen == whole.seen[:stop]
    assert rest.seen == whole.seen[stop:]
    assert torch.equal(rest.layer.weight, whole.layer.weight), "bit for bit, dropout included"


def test_resume_after_a_run_that_stopped_within_an_epoch(toy, whole, tmp_path) -> None:
    """A checkpoint saved after fit: the Trainer counts the unfinished epoch as finished, the data must not."""
    part = fit(toy, tmp_path, max_steps=11, max_epochs=-1)
    part.trainer.save_checkpoint(tmp_path / "after.ckpt")
    rest = fit(toy, tmp_path, ckpt=tmp_path / "after.ckpt", max_steps=24, max_epochs=-1)
    assert [seen[1:] for seen in rest.seen] == [seen[1:] for seen in whole.seen[11:]]


def test_reloaded_loaders_and_a_second_fit(toy, whole, tmp_path) -> None:
    """A loader made anew each epoch goes on; another fit with the same DataModule starts at the beginning."""
    assert fit(toy, tmp_path, reload_dataloaders_every_n_epochs=1).seen == whole.seen
    data = CodesDataModule(toy.root, batch_size=12, window=4, seed=5)
    for _ in range(2):
        module = Probe()
        trainer_for(tmp_path, max_epochs=2).fit(module, datamodule=data)
        assert module.seen == whole.seen[:16]


def test_a_failed_batch_comes_again(toy, whole, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="crash", save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(toy, tmp_path, saver, fail_at=11)
    [saved] = tmp_path.glob("*.ckpt")
    state = torch.load(saved, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert (state["epoch"], state["position"]) == (1, 3)
    rest = fit(toy, tmp_path, ckpt=saved)
    assert rest.seen == whole.seen[11:]


def test_epochs_cut_short_by_the_trainer(toy, whole, tmp_path) -> None:
    """limit_train_batches leaves an epoch early; the next one starts at its own beginning."""
    short = fit(toy, tmp_path, limit_train_batches=5)
    assert short.seen == whole.seen[0:5] + whole.seen[8:13] + whole.seen[16:21]


def test_overfitting_repeats_the_same_batches(toy, tmp_path) -> None:
    module = fit(toy, tmp_path, overfit_batches=2, limit_val_batches=0)
    batches = [seen[1:] for seen in module.seen]
    assert batches == batches[:2] * 3


def test_validation_test_and_prediction_see_each_sample_once(toy, tmp_path) -> None:
    data = CodesDataModule(toy.root, batch_size=12, validation_batch_size=7, num_workers=1)
    for verb, n in [("validate", 23), ("test", 31), ("predict", 31)]:
        module = Probe()
        getattr(trainer_for(tmp_path), verb)(
            module, datamodule=data, **({} if verb == "predict" else {"verbose": False})
        )
        assert module.validated == list(range(n)), verb
    data.limit_validation_samples = 4
    module = Probe()
    trainer_for(tmp_path).validate(module, datamodule=data, verbose=False)
    assert module.validated == [0, 5, 11, 17]


def attached(toy: Manifest, ranks: int, rank: int = 0, **kwargs) -> CodesDataModule:
    """A DataModule as one of several devices sees it."""
    data = CodesDataModule(toy.root, **kwargs)
    progress = SimpleNamespace(current=SimpleNamespace(processed=1000))
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks},
        overfit_batches=0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return data


@pytest.mark.parametrize(
    ("kwargs", "ranks", "message"),
    [
        ({"batch_size": 13}, 2, "batch_size=13 is the global batch .* over 2 devices; use a multiple of 2, such as 14"),
        ({"batch_size": 120}, 1, "107 samples, fewer than one batch of 120"),
        ({"window": 0}, 1, "window=0"),
    ],
)
def test_bad_settings_stop_before_training(toy, kwargs: dict, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(toy, ranks, **kwargs).setup("fit")


def test_captions_need_an_encoder(tmp_path) -> None:
    from flashar_pl.data.shards import ConditionSpec, ShardWriter

    spec = ConditionSpec("text")
    with ShardWriter(tmp_path / "t", name="t", tokenizer={}, grid=(1, 2), vocabulary=3, condition=spec) as writer:
        writer.write("train", torch.zeros(4, 1, 2, dtype=torch.int64).numpy(), ids=range(4), texts=list("abcd"))
    with pytest.raises(ValueError, match="give text_encoder"):
        CodesDataModule(str(tmp_path / "t"), batch_size=2).setup("fit")
    data = CodesDataModule(str(tmp_path / "t"), batch_size=2, text_encoder=lambda s: torch.tensor([ord(s)]))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert [int(ids) - ord("a") for ids in batch.condition] == batch.index.tolist()


def test_resume_from_the_end_of_an_epoch(toy, whole, tmp_path) -> None:
    """The usual checkpoint, written by on_train_epoch_end."""
    fit(toy, tmp_path, ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True), max_epochs=1)
    rest = fit(toy, tmp_path, ckpt=tmp_path / "end.ckpt")
    assert rest.seen == whole.seen[8:]


def test_resume_from_the_end_of_an_epoch_cut_short(toy, whole, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    fit(toy, tmp_path, saver, max_epochs=1, limit_train_batches=5)
    rest = fit(toy, tmp_path, ckpt=tmp_path / "end.ckpt", limit_train_batches=5)
    assert rest.seen == whole.seen[8:13] + whole.seen[16:21]
