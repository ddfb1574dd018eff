"""The wiring of FlashARModule: precision, freezing, averages, initial weights, and what is refused before any step."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from training_toys import (
    STEPS,
    FlashARConfig,
    OptimiserConfig,
    ValidationConfig,
    fit,
    make_data,
    make_module,
    make_trainer,
)

from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models.base import GridModel
from flashar_pl.training.callbacks import TrainingLog
from flashar_pl.training.config import LossConfig, ScheduleConfig, plain_settings, typed_settings
from flashar_pl.training.lightning_private import ddp_options
from flashar_pl.training.logger import RunLogger
from flashar_pl.training.measured import join_predictions
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.optim import adamw
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.strategies import allow_frozen_parameters, check_cut, check_strategy


class Watch(Callback):
    """Losses, rates, frozen roles and weights of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[str, float]] = []
        self.frozen: list[set[str]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates.append({group["role"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        roles = pl_module.net.roles()
        self.losses.append(float(outputs["loss"]))
        self.frozen.append({roles[n] for n, p in pl_module.net.named_parameters() if not p.requires_grad})
        self.weights.append({n: p.detach().clone() for n, p in pl_module.net.named_parameters()})


@pytest.fixture(scope="module")
def raster_checkpoint(tmp_path_factory, toy_shards: str) -> Path:
    root = tmp_path_factory.mktemp("raster")
    save = ModelCheckpoint(root, filename="last")
    fit(root, toy_shards, make_module(flashar=False), max_steps=6, enable_checkpointing=True, callbacks=[save])
    return root / "last.ckpt"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("flashar", [True, False])
def test_trains_with_float32_weights(tmp_path: Path, toy_shards: str, precision: str, flashar: bool) -> None:
    """Thirty steps learn the toy, weights stay float32 under bfloat16 compute."""
    watch = Watch()
    fit(tmp_path, toy_shards, make_module(flashar), max_steps=30, precision=precision, callbacks=[watch])
    assert {p.dtype for p in watch.weights[-1].values()} == {torch.float32}
    assert sum(watch.losses[-3:]) / 3 < 0.8 * watch.losses[0]


def test_stage_one_moves_only_the_new_parts(tmp_path: Path, toy_shards: str) -> None:
    """Frozen means bit-equal: weight decay, moments or a late freeze would show."""
    watch = Watch()
    module = fit(tmp_path, toy_shards, make_module(), callbacks=[watch])
    roles = module.net.roles()
    assert watch.frozen == [{"backbone", "horizontal_head"}] * 2 + [set()] * (STEPS - 2)
    for name, role in roles.items():
        moved = not torch.equal(watch.weights[1][name], watch.weights[0][name])
        assert moved == (role in ("vertical", "vertical_head", "gate")), name
        assert not torch.equal(watch.weights[-2][name], watch.weights[2][name]), name
    for step, rates in enumerate(watch.rates):
        assert rates == {role: 1e-2 * module.built_schedule.scale(role, step) for role in rates}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(tmp_path: Path, toy_shards: str, precision: str) -> None:
    """The norm of all gradients together, before the one kernel that updates a parameter: Lightning clips no such."""
    norms = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            grads = [p.grad for p in pl_module.net.parameters() if p.grad is not None]
            norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))

    module = make_module(optimiser=OptimiserConfig(lr=1e-2, clip=0.05))
    fit(tmp_path, toy_shards, module, callbacks=[Norms()], precision=precision)
    assert max(norms) == pytest.approx(0.05, rel=1e-3)
    assert module.optimizers().defaults["fused"]
    assert not adamw(module.net, OptimiserConfig(), unscaled=False).defaults["fused"], "a scaler unscales no fused one"


def test_the_auxiliary_weight_reaches_the_loss(tmp_path: Path, toy_shards: str) -> None:
    """fused + 0.05 (H + V) by default; the setting must not be ignored."""
    seen = {}
    for weight in (0.05, 1.0):
        watch = Watch()
        fit(tmp_path, toy_shards, make_module(aux_weight=weight), max_steps=1, callbacks=[watch])
        seen[weight] = watch.losses[0]
    assert seen[1.0] > seen[0.05] * 2  # at the start all three terms are ln V


def test_distillation_acts_in_stage_one_only(tmp_path: Path, toy_shards: str, monkeypatch) -> None:
    """A weight that never arrives, and one that stays when the teacher has begun to move."""
    seen, loss = [], GridModel.loss

    def watched(self: GridModel, *given: Any, **options: Any) -> Any:
        seen.append(options.get("distillation"))
        return loss(self, *given, **options)

    monkeypatch.setattr(GridModel, "loss", watched)
    fit(tmp_path, toy_shards, make_module(losses=LossConfig(distillation=0.2)), limit_val_batches=0)
    assert seen == [0.2] * 2 + [0.0] * (STEPS - 2)
    with pytest.raises(ValueError, match="acts in stage 1"):
        make_module(losses=LossConfig(distillation=0.2), schedule=ScheduleConfig(stage1_share=0.0))


def test_averages_move_once_per_optimiser_step(tmp_path: Path, toy_shards: str) -> None:
    """With accumulated gradients a batch without a step must not move them."""
    watch = Watch()
    module = make_module(ema_decay=0.5)
    module.configure_model()
    start = {name: value.clone() for name, value in module.net.state_dict().items()}
    fit(tmp_path, toy_shards, module, max_steps=2, accumulate_grad_batches=2, callbacks=[watch])
    assert module.ema is not None
    for name, value in module.ema.state_dict().items():
        first = torch.lerp(start[name], watch.weights[1][name], 0.5)
        assert torch.equal(value, torch.lerp(first, watch.weights[3][name], 0.5)), name


def test_logged_losses_are_means_over_accumulated_batches(tmp_path: Path, toy_shards: str) -> None:
    """Lightning writes what the last batch of a step has logged: with batches of one image, the loss of one image."""
    losses, logged = [], []

    class Compare(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(float(outputs["loss"]) * 3)  # Lightning has divided it
            if "train/loss" in trainer.logged_metrics:
                logged.append((trainer.global_step, float(trainer.logged_metrics["train/loss"])))

    fit(tmp_path, toy_shards, make_module(), max_steps=4, accumulate_grad_batches=3, log_every_n_steps=2,
        callbacks=[Compare()])  # fmt: skip
    assert logged[0] == (2, pytest.approx(sum(losses[3:6]) / 3))


def test_callbacks_run_before_checkpoints(tmp_path: Path, toy_shards: str) -> None:
    """A second fit with the same trainer gets no second set."""
    module = make_module(ema_decay=0.9)
    trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path)], max_steps=1)
    for _ in range(2):
        trainer.fit(module, datamodule=make_data(toy_shards))
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert kinds.count("EmaUpdate") == kinds.count("StageSwitch") == kinds.count("HeldOutLosses") == 1
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)


def test_starts_from_a_raster_checkpoint(tmp_path: Path, toy_shards: str, raster_checkpoint: Path, capsys) -> None:
    """Layers, norm and head are cloned after the weights are read, and what came from where is printed."""
    module = make_module(init_from=str(raster_checkpoint), ema_decay=0.9)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    [results] = trainer.validate(module, datamodule=make_data(toy_shards), verbose=False)
    raster = load_model(raster_checkpoint).model
    backbone = module.net.backbone
    assert torch.equal(backbone.blocks[0].attention.wqkv.weight, raster.backbone.blocks[0].attention.wqkv.weight)
    assert torch.equal(module.net.dual_head.vertical.weight, raster.backbone.head.weight)
    cloned = module.net.vertical.blocks[0].state_dict()
    assert all(torch.equal(value, cloned[name]) for name, value in raster.backbone.blocks[1].state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(module.ema.parameters(), module.net.parameters(), strict=True))
    assert results["val/nll"] > 0
    again = make_module(init_from=str(raster_checkpoint), flashar=False)
    again.configure_model()
    again.load_initial_weights()
    assert torch.equal(again.net.backbone.head.weight, raster.backbone.head.weight)


def test_a_continued_run_does_not_read_its_initial_weights(tmp_path: Path, toy_shards: str) -> None:
    """They would be overwritten, and the file may be gone by then."""
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, toy_shards, make_module(), max_steps=3, enable_checkpointing=True, callbacks=[save])
    module = make_module(init_from=str(tmp_path / "gone.ckpt"))
    fit(tmp_path, toy_shards, module, ckpt_path=tmp_path / "last.ckpt", max_steps=4)
    with pytest.raises(ValueError, match="no file"):
        fit(tmp_path, toy_shards, make_module(init_from=str(tmp_path / "gone.ckpt")), max_steps=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 8}, "feature extractor"),
        ({"features": "x"}, "samples is 0"),
        ({"cfg_scale": -1}, "0 or more"),
        ({"sample_batch": 0}, "at least"),
    ],
)
def test_wrong_validation_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-true"}, "bf16-mixed"),
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val is 0.5.* clipped at model.optimiser.clip \(now 1.0\)"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; expected 1 or more"),
        ({"max_steps": -1, "max_epochs": -1}, "max_steps"),
    ],
)
def test_wrong_trainers_are_refused(tmp_path: Path, toy_shards: str, options: dict, message: str) -> None:
    """The Trainer's own clipping would be an error of the first step, when 34 B parameters have been read."""
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, toy_shards, **options)


def test_a_strategy_that_shares_nothing_is_refused() -> None:
    """Two processes of Lightning's ModelParallelStrategy drifted apart by 0.05 in five steps, without an error."""
    with pytest.raises(ValueError, match=r"ModelParallelStrategy; expected auto, ddp, .*training\.ShardedStrategy"):
        check_strategy(ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    whole = make_module()
    whole.configure_model()
    with pytest.raises(ValueError, match="this module has whole weights"):
        check_cut(whole.net, ShardedStrategy())
    with pytest.raises(ValueError, match="find_unused_parameters=False"):
        allow_frozen_parameters(DDPStrategy(find_unused_parameters=False))
    allow_frozen_parameters(strategy := DDPStrategy())
    assert ddp_options(strategy)["gradient_as_bucket_view"], "the plan counts one set of gradients, and DDP held two"
    with pytest.raises(ValueError, match="static_graph=True"):
        allow_frozen_parameters(DDPStrategy(static_graph=True))


def test_a_monitor_that_not_every_validation_has_is_refused(tmp_path: Path, toy_shards: str, toy_classifier) -> None:
    """The first validation without it would end the run."""
    module = make_module(validation=ValidationConfig(samples=4, features=toy_classifier, fid_every=2))
    with pytest.raises(ValueError, match="fid_every is 2, but a callback monitors val/fid"):
        fit(tmp_path, toy_shards, module, enable_checkpointing=True, callbacks=[ModelCheckpoint(monitor="val/fid")])


def test_a_checkpoint_is_a_module(tmp_path: Path, toy_shards: str) -> None:
    """The module that wrote a checkpoint comes back from the path alone, with raw and averaged weights."""
    module = make_module(ema_decay=0.9, aux_weight=0.1, validation=ValidationConfig(plan="raster", seed=4))
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, toy_shards, module, max_steps=2, enable_checkpointing=True, callbacks=[save])
    random = torch.get_rng_state()
    again = FlashARModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(torch.get_rng_state(), random)
    assert again.settings() == module.settings()
    weights = module.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert any(name.startswith("ema.") for name in weights)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    plain = FlashARModule.load_from_checkpoint(tmp_path / "last.ckpt", ema_decay=None)
    assert plain.ema is None
    assert torch.equal(plain.net.dual_head.horizontal.weight, module.net.dual_head.horizontal.weight)
    with pytest.raises(ValueError, match="does not fit flashar"):
        FlashARModule.load_from_checkpoint(tmp_path / "last.ckpt", flashar=FlashARConfig(branch_layer=0))
    assert typed_settings(plain_settings({"optimiser": OptimiserConfig()}))["optimiser"] == OptimiserConfig()
    with pytest.raises(ValueError, match="no file"):
        FlashARModule.load_from_checkpoint(tmp_path / "none.ckpt")


def test_names_of_classes_go_with_a_checkpoint(tmp_path: Path, toy_shards: str, monkeypatch) -> None:
    module = make_module()
    fit(tmp_path, toy_shards, module, max_steps=1)
    assert module.description().class_names == []
    names = tuple(f"class {i}" for i in range(module.manifest.condition.num_classes))
    named = replace(module.manifest, class_names=names)
    monkeypatch.setattr(FlashARModule, "manifest", named)
    assert tuple(module.description().class_names) == names


def test_averages_added_to_a_loaded_module_are_its_own(raster_checkpoint: Path, tmp_path: Path, toy_shards) -> None:
    """Shared with the weights they would follow every step whole."""
    module = FlashARModule.load_from_checkpoint(raster_checkpoint, ema_decay=0.9)
    before = module.net.backbone.head.weight.detach().clone()
    fit(tmp_path, toy_shards, module, max_steps=2)
    after, average = module.net.backbone.head.weight, module.ema.backbone.head.weight
    assert module.total_steps == 2
    assert not torch.equal(after, before)
    assert not torch.equal(average, after)
    assert not torch.equal(average, before)


def test_prediction_is_the_likelihood_of_each_image(tmp_path: Path, toy_shards: str) -> None:
    module = make_module()
    module.configure_model()
    parts = make_trainer(tmp_path).predict(module, datamodule=make_data(toy_shards, validation_batch_size=4))
    nll = torch.cat([part["nll"][part["valid"]] for part in parts])
    assert nll.shape == (7,)
    torch.testing.assert_close(nll, torch.full((7,), 16 * torch.tensor(8.0).log().item()))  # uniform before training
    parts[0]["nll"] = torch.full((4,), torch.nan)
    with pytest.raises(ValueError, match="the likelihood of test image 0 is nan"):  # it was written to the file
        join_predictions(parts)


def test_an_interrupted_run_ends(tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C inside `Condition.notify` leaves TensorBoard's thread asleep: one run in fifty did not end."""
    monkeypatch.setattr("flashar_pl.training.logger.PATIENCE", 0.1)
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    thread = logger.experiment.file_writer.event_writer._async_writer._worker
    monkeypatch.setattr(thread, "stop", lambda: threading.Event().wait())
    before = time.monotonic()
    logger.finalize("failed")
    assert time.monotonic() - before < 10


def test_a_second_fit_has_its_own_length(tmp_path: Path, toy_shards: str) -> None:
    """In a notebook: with the length of the first one, all steps after it would have a rate of 0."""
    watch, module = Watch(), make_module()
    fit(tmp_path, toy_shards, module, max_steps=2)
    fit(tmp_path, toy_shards, module, max_steps=6, callbacks=[watch])
    assert module.total_steps == 6
    assert watch.rates[-1]["gate"] > 0


def test_a_callback_of_ones_own_takes_the_place_of_ours(tmp_path: Path, toy_shards: str) -> None:
    class Quiet(TrainingLog):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Quiet()], max_steps=1)
    trainer.fit(make_module(), datamodule=make_data(toy_shards))
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, TrainingLog)] == [Quiet]
