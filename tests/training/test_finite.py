"""A loss or gradient that is not finite changes no weight, and a metric that cannot be computed ends no training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from training_toys import FlashARConfig, OptimiserConfig, ScheduleConfig, ValidationConfig, fit, make_module

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.metrics.fid import RowFID
from flashar_pl.models import dual_head
from flashar_pl.models.lora import LoraConfig
from flashar_pl.training.config import BlockDiffusionConfig, IntraConfig, LossConfig, PARConfig
from flashar_pl.training.finite import NotFinite, not_finite


class Breaks(Callback):
    """Makes a gradient infinite in some batches, counted from 0."""

    def __init__(self, *batches: int) -> None:
        self.batches, self.seen, self.before = batches, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen[trainer.global_step] = batch.index.tolist()

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.total_batch_idx in self.batches:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            pl_module.net.dual_head.vertical.weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optimiser": OptimiserConfig(lr=math.nan)}, "model.optimiser.lr"),
        ({"optimiser": OptimiserConfig(betas=(0.9, math.inf))}, "model.optimiser.betas.1"),
        ({"aux_weight": math.nan}, "model.aux_weight"),
        ({"losses": LossConfig(distillation=math.nan)}, "model.losses.distillation"),
        ({"schedule": ScheduleConfig(backbone_factor=math.inf)}, "model.schedule.backbone_factor"),
        ({"validation": {"temperature": math.inf}}, "temperature"),
    ],
    ids=str,
)
def test_settings_are_finite_numbers(settings: dict, name: str) -> None:
    """NaN passed every comparison with a bound, and the run ended at its first checkpoint, without the cause."""
    with pytest.raises(ValueError, match=f"{name} is (nan|inf); expected"):
        make_module(**settings)


def every_step(root: Path) -> dict:
    save = ModelCheckpoint(root / "checkpoints", filename="last", every_n_train_steps=1, enable_version_counter=False)
    return {"callbacks": [save], "enable_checkpointing": True}


def test_a_gradient_that_is_not_finite_ends_the_run(toy_shards: str, tmp_path: Path) -> None:
    """Step and samples are named, the checkpoint before stays, and what is saved replays the step: the same error."""
    breaks, run = Breaks(3), every_step(tmp_path)
    run["callbacks"].append(breaks)
    with pytest.raises(NotFinite, match=r"step 4: the loss is \d.*gradients of net.dual_head.vertical.weight") as first:
        fit(tmp_path, toy_shards, make_module(), **run)
    assert ", ".join(map(str, breaks.seen[3])) in str(first.value)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert all(torch.equal(value, breaks.before[name]) for name, value in kept["state_dict"].items())
    again = Breaks(3)
    with pytest.raises(NotFinite) as second:
        fit(tmp_path, toy_shards, make_module(), tmp_path / "checkpoints" / "last.ckpt", callbacks=[again])
    assert str(second.value) == str(first.value)


def test_what_replays_the_step_is_saved(toy_shards: str, tmp_path: Path) -> None:
    """Where no checkpoint is recent, with the generators as they were when the step began."""
    run = every_step(tmp_path)
    run["callbacks"] = [ModelCheckpoint(tmp_path, every_n_train_steps=100), Breaks(6)]
    with pytest.raises(NotFinite) as first:
        fit(tmp_path, toy_shards, make_module(), accumulate_grad_batches=2, **run)
    stopped = tmp_path / "checkpoints" / "stopped.ckpt"
    assert torch.load(stopped, weights_only=True)["global_step"] == 3
    with pytest.raises(NotFinite) as second:
        fit(tmp_path, toy_shards, make_module(), stopped, accumulate_grad_batches=2, callbacks=[Breaks(6)])
    assert str(second.value) == str(first.value)


def test_steps_may_be_left_out(toy_shards: str, tmp_path: Path) -> None:
    """Weights and moments stay; the number is one of the whole run, kills included."""
    breaks, run = Breaks(2, 5), every_step(tmp_path)
    run["callbacks"].append(breaks)
    optimiser = OptimiserConfig(lr=1e-2, skip_not_finite=1)
    with pytest.warns(UserWarning, match="The step is left out, 1 of at most 1"), pytest.raises(NotFinite, match="6:"):
        fit(tmp_path, toy_shards, make_module(optimiser=optimiser), **run)
    start = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(start, weights_only=True)["global_step"] == 5
    with pytest.raises(NotFinite, match="step 6"):
        fit(tmp_path, toy_shards, make_module(optimiser=optimiser), start, callbacks=[Breaks(5)])


def test_weights_that_are_not_finite_are_not_saved(toy_shards: str, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.net.backbone.head.weight[0, 0] = torch.nan

    run = every_step(tmp_path)
    run["callbacks"].append(Spoil())
    with pytest.raises(NotFinite, match=r"after step 2 weights are not finite: net\.dual_head\.horizontal"):
        fit(tmp_path, toy_shards, make_module(), **run)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_metric_that_cannot_be_computed_is_missing(
    toy_shards: str, toy_classifier: str, tmp_path: Path, monkeypatch
) -> None:
    """The other metrics are there, and who monitors it sees no number, not the one of an earlier validation."""

    def fail(self) -> None:
        raise ValueError("not a covariance")

    monkeypatch.setattr(RowFID, "compute", fail)
    module = make_module(validation=ValidationConfig(samples=6, features=toy_classifier))
    validating = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with pytest.warns(UserWarning, match="val/fid of step 2 is missing: not a covariance"):
        fit(tmp_path, toy_shards, module, max_steps=2, **validating)
    metrics = module.trainer.callback_metrics
    assert metrics["val/fid"].isnan()
    assert 1 <= metrics["val/is"] <= 3
    assert metrics["val/nll"] > 0


def test_a_missing_metric_stops_no_run_and_replaces_no_best(toy_shards: str, tmp_path: Path) -> None:
    """EarlyStopping ended the run at the first Fréchet distance that could not be computed."""
    values = [math.nan, 5.0, math.nan, 7.0, math.nan, math.nan, 9.0]

    class Scores(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.log("val/score", values[trainer.global_step - 1], batch_size=1)

    class OwnStopping(EarlyStopping):
        """A class of the user's, for which no number was a validation without improvement."""

    stop = OwnStopping("val/score", patience=2)
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/score", save_top_k=1)
    module = make_module()
    validating = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    options = {"enable_checkpointing": True, "callbacks": [Scores(), stop, best], **validating}
    fit(tmp_path, toy_shards, module, max_steps=7, **options)
    assert module.trainer.global_step == 7
    assert (float(stop.best_score), stop.wait_count) == (5.0, 2)
    assert float(best.best_model_score) == 5.0
    assert best.best_model_path.endswith("step=2.ckpt")
    assert "OwnStopping" in stop.state_key


def test_a_message_names_four_parameters_and_counts_the_rest() -> None:
    bad = {f"w{i}": torch.full((2,), torch.nan) for i in range(6)}
    assert not_finite({**bad, "good": torch.ones(1)}) == "w0, w1, w2, w3 and 2 more"
    assert not_finite(dict(list(bad.items())[:4])) == "w0, w1, w2, w3"
    assert not_finite({"good": torch.ones(1)}) == not_finite({}) == ""


TERMS: dict[str, tuple[dict[str, Any], str]] = {
    "distillation": ({"losses": LossConfig(distillation=0.2)}, "DualHead.distillation"),
    "gate_collapse": ({"losses": LossConfig(gate_collapse=0.1)}, "DualHead.gate_collapse"),
    "split": ({"losses": LossConfig(split=0.5)}, "dual_nll"),
    "column0": ({"losses": LossConfig(split=1.0, column0=0.1)}, "target_weights"),
    "intra": ({"flashar": FlashARConfig(branch_layer=1, intra=IntraConfig())}, ".intra.out"),
    "PAR": ({"flashar": None, "par": PARConfig()}, "backbone.norm"),
    "BlockDiffusion": ({"flashar": None, "block_diffusion": BlockDiffusionConfig("row")}, "backbone.norm"),
    "LoRA": ({"lora": LoraConfig(rank=2, alpha=4)}, "lora_B.default"),
    "average": ({"flashar": FlashARConfig(branch_layer=1, fusion="average"), "ema_decay": 0.5}, "backbone.norm"),
}
"""Arguments of the module, and the function or the end of a layer's name that gives no number once."""


class NoNumber(Callback):
    """Lets a term of the loss be no number in one batch, counted from 0."""

    def __init__(self, batch: int, source: str, patch: pytest.MonkeyPatch) -> None:
        self.batch, self.source, self.patch, self.now, self.ids = batch, source, patch, False, []

    def spoil(self, value: Any) -> Any:
        if not self.now:
            return value
        if isinstance(value, tuple):
            return type(value)(self.spoil(each) for each in value) if len(value) else value
        return value * math.nan if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def on_fit_start(self, trainer, pl_module) -> None:
        layers = [layer for name, layer in pl_module.net.named_modules() if name.endswith(self.source)]
        for layer in layers:
            layer.register_forward_hook(lambda module, given, value: self.spoil(value))
        if not layers:
            owner, _, name = self.source.rpartition(".")
            place = getattr(dual_head, owner) if owner else dual_head
            plain = getattr(place, name)
            self.patch.setattr(place, name, lambda *args, **options: self.spoil(plain(*args, **options)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.now = trainer.fit_loop.total_batch_idx == self.batch
        if self.now:
            self.ids = batch.index.tolist()


@pytest.mark.parametrize(("term", "skip"), [*((term, 0) for term in TERMS), ("distillation", 1), ("PAR", 1)])
def test_every_term_of_a_loss_is_looked_at(toy_shards: str, tmp_path: Path, monkeypatch, term: str, skip: int) -> None:
    """Whatever is trained: step and samples are named, no weight changes, the last checkpoint is good."""
    settings, source = TERMS[term]
    if "lora" in settings:
        raster = make_module(flashar=False)
        raster.configure_model()
        save_model(tmp_path / "raster", raster.net, Description(raster.net.config()))
        settings = settings | {"init_from": str(tmp_path / "raster")}
    breaks, run = NoNumber(1, source, monkeypatch), every_step(tmp_path)
    run["callbacks"].append(breaks)
    module = make_module(**settings, optimiser=OptimiserConfig(lr=1e-2, skip_not_finite=skip))
    if skip:
        with pytest.warns(UserWarning, match="step 2: the loss is nan.*The step is left out, 1 of at most 1"):
            fit(tmp_path, toy_shards, module, max_steps=6, **run)
    else:
        with pytest.raises(NotFinite, match="step 2: the loss is nan") as error:
            fit(tmp_path, toy_shards, module, max_steps=6, **run)
        assert f"samples {', '.join(map(str, breaks.ids))}." in str(error.value)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == (6 if skip else 1)
    assert not not_finite({name: value for name, value in kept["state_dict"].items() if value.is_floating_point()})
