"""The LightningModule of raster pre-training and FlashAR post-training: wiring only.

The step's mathematics is `GridModel.loss`, the schedule `stages.py`, what happens around a step `callbacks.py`, what a
validation measures `evaluation.py`.

Shapes: B samples, H, W grid.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flashar_pl.backbones import Backbone, Batch, describe_backbone
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY, EMA_PREFIX, RunCheckpoint
from flashar_pl.data.manifest import check_frames
from flashar_pl.grid import DecodePlan
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import LoraConfig, adaptation
from flashar_pl.models.losses import AUX_WEIGHT
from flashar_pl.training.averaging import EmaUpdate, average_of, follow_frozen, keep_frozen_once
from flashar_pl.training.callbacks import LOGGED, RandomState, StageSwitch, TrainingLog
from flashar_pl.training.checkpoints import LastCheckpoint
from flashar_pl.training.checks import (
    check_guidance,
    check_model,
    check_trainer,
    idle_parts,
    initial_weights,
)
from flashar_pl.training.config import (
    LOSS_OPTIONS,
    OPTIMISER,
    SCHEDULE,
    VALIDATION,
    BackboneConfig,
    BlockDiffusionConfig,
    FlashARConfig,
    LossConfig,
    OptimiserConfig,
    PARConfig,
    ScheduleConfig,
    ValidationConfig,
    check_finite,
    model_config,
    plain_settings,
    typed_settings,
)
from flashar_pl.training.drawn_samples import DrawnSamples
from flashar_pl.training.evaluation import HeldOutLosses
from flashar_pl.training.finite import FiniteSteps
from flashar_pl.training.nested import typed_options
from flashar_pl.training.optim import adamw, staged_rates
from flashar_pl.training.preemption import SaveOnStop, StopOnSignal
from flashar_pl.training.save_point import SavePoint
from flashar_pl.training.stages import Schedule
from flashar_pl.training.strategies import check_cut, first_weights, new_model
from flashar_pl.training.validation import LOSSES
from flashar_pl.training.whole_steps import WholeSteps


class FlashARModule(LightningModule):
    """Trains a raster model, or post-trains FlashAR from one. Nested options may be dictionaries, as in a YAML.

    Args:
        backbone: the raster model; or {class_path: mine.Backbone, init_args: ...}, a backbone of your own.
        flashar: vertical branch and fusion, such as {branch_layer: 11}; null = raster pre-training.
        par: trains a PAR model instead, such as {tokens_per_step: 4}.
        block_diffusion: trains a BlockDiffusion model instead, such as {strategy: sub4x4, clean_context: true}.
        lora: freezes the backbone and trains low-rank updates of it, such as {rank: 64}; null = the backbone trains.
        init_from: official file, checkpoint, converted model, or OWNER/NAME in the Hub cache; null = random weights.
            The vertical branch is cloned from a raster model.
        optimiser: AdamW.
        schedule: stages and learning rates.
        aux_weight: weight of the losses of the single heads.
        losses: other weights for each of them, and what the authors' code adds to the loss.
        ema_decay: keep averaged weights with this decay, such as 0.999, and validate with those; null = off.
        validation: what a validation does besides the likelihood of held-out images.
    """

    def __init__(
        self,
        backbone: BackboneConfig | Backbone,
        flashar: FlashARConfig | None = None,
        par: PARConfig | None = None,
        block_diffusion: BlockDiffusionConfig | None = None,
        lora: LoraConfig | None = None,
        init_from: str | None = None,
        optimiser: OptimiserConfig = OPTIMISER,
        schedule: ScheduleConfig = SCHEDULE,
        aux_weight: float = AUX_WEIGHT,
        losses: LossConfig = LOSS_OPTIONS,
        ema_decay: float | None = None,
        validation: ValidationConfig = VALIDATION,
    ) -> None:
        super().__init__()
        given = {"backbone": backbone, "flashar": flashar, "par": par, "block_diffusion": block_diffusion, "lora": lora,
                 "optimiser": optimiser, "schedule": schedule, "validation": validation, "losses": losses}  # fmt: skip
        backbone, flashar, par, block_diffusion, lora, optimiser, schedule, validation, losses = typed_options(
            FlashARModule, given
        ).values()
        backbone = BackboneConfig.of(backbone)
        self.model_config = model_config(backbone, flashar, par, block_diffusion)
        self.backbone, self.flashar, self.lora, self.init_from = backbone, flashar, lora, init_from
        self.par, self.block_diffusion = par, block_diffusion
        check_model(lora, flashar, init_from, aux_weight)
        self.schedule = schedule.resolve(raster=flashar is None and block_diffusion is None, lora=lora is not None)
        if losses.distillation and not self.schedule.stage1_share:
            raise ValueError(
                "model.losses.distillation acts in stage 1; set schedule.stage1_share above 0, or leave it out."
            )
        own = describe_backbone(self.model_config["backbone"])
        self.optimiser = optimiser
        self.validation = validation = validation.of(own.published_cfg_scale if own.knows_null else None)
        self.aux_weight, self.losses, self.ema_decay = aux_weight, losses, ema_decay
        check_finite(self.settings())
        self._loss_options = losses.options(aux_weight, flashar)
        self.net: GridModel
        self.ema: GridModel | None = None
        keep_frozen_once(self)
        self.total_steps: int | None = None
        """Length of the run in optimiser steps, fixed when it starts and kept in its checkpoints."""
        self.gradient_norm = torch.tensor(math.nan)
        """() of all gradients of the last step, before they were clipped."""
        self._has_weights = False
        average = [] if ema_decay is None else [EmaUpdate(ema_decay)]
        samples = [DrawnSamples(validation)] if validation.samples or validation.grid_images else []
        self._finite, self._save_point = FiniteSteps(optimiser.skip_not_finite), SavePoint()
        self._run_callbacks: list[Callback] = [
            WholeSteps(), RandomState(), StageSwitch(), TrainingLog(), *average, HeldOutLosses(), *samples,
            LastCheckpoint(), self._finite, self._save_point, SaveOnStop(self._save_point),
        ]  # fmt: skip

    def configure_callbacks(self) -> list[Callback]:
        """What a run cannot do without. A class of the Trainer's that inherits from one of these takes its place."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        added = [
            own
            for own in self._run_callbacks
            if own not in present and not any(type(own) in type(other).__mro__[1:] for other in present)
        ]
        if added:
            rank_zero_info(f"Callbacks of every run: {', '.join(type(callback).__name__ for callback in added)}.")
        return [*added, *(other for other in present if isinstance(other, StopOnSignal))]  # it saves what those did

    @property
    def _strategy(self) -> Strategy | None:
        """None without a Trainer."""
        try:
            return self.trainer.strategy
        except RuntimeError:
            return None

    def configure_model(self) -> None:
        """Build the model with new float32 weights, once; a sharded one without weights."""
        if hasattr(self, "net"):
            return check_cut(self.net, self._strategy)
        self.net = new_model(self.model_config, self._strategy, self.lora)
        if self.ema_decay is not None:
            self.ema = average_of(self.net, self._strategy)

    def load_initial_weights(self) -> None:
        """Read `init_from` and copy the result into the averaged weights, unless a checkpoint was restored."""
        if self._has_weights:
            return
        self._has_weights = True
        path = None if self.init_from is None else initial_weights(self.init_from)
        if (report := first_weights(self.net, path, self._strategy)) is not None:
            rank_zero_info(str(report))
        if self.ema is not None:
            self.ema.load_state_dict(self.net.state_dict())

    @property
    def evaluated(self) -> GridModel:
        """The averaged model if there is one, else the trained one."""
        return self.net if self.ema is None else self.ema

    @property
    def manifest(self) -> Any:
        """The data module's, or None."""
        return getattr(self.trainer.datamodule, "manifest", None)  # type: ignore[attr-defined]

    @property
    def built_schedule(self) -> Schedule:
        """The schedule of the run; known once training has started."""
        assert self.total_steps is not None
        return self.schedule.build(self.total_steps)

    def setup(self, stage: str) -> None:
        """Check precision and data against the model. Raises ValueError."""
        if stage == "fit":
            check_trainer(self.trainer, self.optimiser.clip)
            self.total_steps = None  # a module may be fitted again, from the start
        backbone = describe_backbone(self.model_config["backbone"])
        check_guidance(backbone, self.validation)
        if (check := getattr(self.trainer.datamodule, "check_model", None)) is not None:  # type: ignore[attr-defined]
            check(backbone.vocabulary, backbone.conditioning)
            if self.flashar is not None:
                check_frames(self.manifest, 1 if self.flashar.video is None else self.flashar.video.frames)

    # --- first weights: where a checkpoint is restored, that was before, or with shards after on_fit_start ------------

    def on_fit_start(self) -> None:
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self.load_initial_weights()

    def on_train_start(self) -> None:
        self.load_initial_weights()
        if self.trainer.ckpt_path is None:
            roles = [group["role"] for each in self.trainer.optimizers for group in each.param_groups]
            for note in idle_parts(self.trainer, self.built_schedule, roles):
                rank_zero_warn(note)

    def on_validation_start(self) -> None:
        self.load_initial_weights()

    on_test_start = on_predict_start = on_validation_start

    # --- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        options = self._loss_options
        if self.losses.distillation and self.built_schedule.stage(self.global_step) == 2:
            options = options | {"distillation": 0.0}
        condition = self.net.backbone.condition_of(batch)
        losses = self.net.loss(batch.codes, condition, valid=batch.valid, **options)
        return {"loss": losses["loss"], LOGGED: torch.stack([losses[name] for name in LOSSES]).detach()}

    def evaluation_plan(self, codes: Tensor) -> DecodePlan:
        """The plan of validation for codes (B, H, W)."""
        return self.net.make_plan(self.validation.plan or self.net.plan_name, codes.shape[1], codes.shape[2])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        plan = self.evaluation_plan(batch.codes)
        condition = self.net.backbone.condition_of(batch)
        return self.evaluated.loss(batch.codes, condition, plan=plan, valid=batch.valid, aux_weight=self.aux_weight)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Likelihood of each image: "nll" (B,) in nats, with the batch's "index" and "valid" (B,)."""
        return {"nll": self.validation_step(batch, batch_idx)["nll"], "index": batch.index, "valid": batch.valid}

    def configure_optimizers(self) -> Any:
        """AdamW, and the learning rates of the schedule, which needs to know how long the run is."""
        planned = self.trainer.estimated_stepping_batches
        if self.total_steps is None:
            if not math.isfinite(planned) or planned < 1:
                raise ValueError(
                    f"the run has {planned} steps; the schedule needs their number: set trainer.max_steps or "
                    "trainer.max_epochs."
                )
            self.total_steps = int(planned)
        optimiser = adamw(self.net, self.optimiser, unscaled=self.trainer.precision != "16-mixed")
        scheduler = staged_rates(optimiser, lambda: self.built_schedule)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._finite.check(self.trainer, self, self.gradient_norm)
        clip_grads_with_norm_(self.parameters(), self.optimiser.clip, norm)
        self._save_point.in_update = True

    # --- checkpoint -------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Constructor arguments as plain types, in the layout of the `model:` part of a YAML."""
        return plain_settings({name: getattr(self, name) for name in inspect.signature(FlashARModule).parameters})

    def description(self) -> Description:
        """Model, grid and tokenizer, and under "training" the step, the length, the stage, all settings and what the
        data module adds: the grids where there are several, the names of classes, and the prompts of Emu3.5."""
        step, data, manifest = self.trainer.global_step, self.trainer.datamodule, self.manifest  # type: ignore[attr-defined]
        training: dict[str, Any] = {"step": step, "total_steps": self.total_steps, "settings": self.settings()}
        grids = [list(grid) for grid in dict.fromkeys(each.grid for each in getattr(data, "manifests", ()))]
        if len(grids) > 1:
            training["grids"] = grids
        if manifest is not None and manifest.class_names:
            training["class_names"] = list(manifest.class_names)
        if getattr(data, "prompts", None) is not None:
            training |= {"prompts": data.prompts, "max_prompt": data.max_prompt}
        if self.total_steps is not None:
            training["stage"] = self.built_schedule.stage(step)
        lora = adaptation(self.net)
        return Description(
            model=self.net.config(),
            grid=None if manifest is None else tuple(manifest.grid),
            tokenizer=None if manifest is None else dict(manifest.tokenizer),
            training=training,
            lora=None if lora is None else lora.to_dict(),
            strange=frozenset() if manifest is None else manifest.strange,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.description().to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if CHECKPOINT_KEY not in checkpoint:
            raise ValueError(
                "this checkpoint was not written by flashar-pl; to start from its weights set model.init_from."
            )
        self.total_steps = checkpoint[CHECKPOINT_KEY]["training"].get("total_steps")
        self._has_weights = True
        follow_frozen(self.net, self.ema)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """The module that wrote a checkpoint, a file or a sharded directory, with its raw and averaged weights.

        It is made from plain values of the checkpoint: nothing that it names is imported or opened. To train on, give
        the same path to the Trainer too.

        Args:
            checkpoint_path: written by a fit.
            map_location: device of the weights; None = the CPU.
            hparams_file, weights_only: Lightning's; a checkpoint holds its own settings, and no code.
            strict: whether the names of the weights must be the model's.
            overrides: constructor arguments in place of the stored ones, such as validation.

        Raises:
            ValueError: no such checkpoint, another program's, or weights that do not fit the overrides.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError("a checkpoint holds its settings and no code; leave out hparams_file and weights_only.")
        stored = RunCheckpoint(checkpoint_path)
        settings = typed_settings(stored.description.training["settings"])
        if settings["backbone"].directory is not None:  # may be gone, or another one
            options = dict(stored.description.model["backbone"])
            settings["backbone"] = BackboneConfig(kind=options.pop("kind"), options=options)
        strange, validation = stored.description.strange, settings.get("validation")
        if isinstance(validation, ValidationConfig) and strange & {validation.features, validation.reference}:
            rank_zero_warn(f"{checkpoint_path} is another user's: what it measures samples with is left out, give it.")
            settings["validation"] = replace(validation, features=None, reference=None, samples=0)
        module = cls(**{**settings, **overrides})
        with torch.device("meta"):
            module.configure_model()
        module._has_weights = True
        names = stored.names()
        try:
            module.load_state_dict(stored.tensors({name: name for name in names}), strict is not False, assign=True)
        except RuntimeError as error:
            what = ", ".join(overrides) or "its own settings"
            raise ValueError(f"{checkpoint_path} does not fit {what}: {error}") from error
        if module.ema is not None and not any(name.startswith(EMA_PREFIX) for name in names):
            module.ema = average_of(module.net, None)
        return module.to(map_location or "cpu")
