"""The callback that turns validation and test batches into numbers and pictures.

Shapes: B samples, H, W grid, b samples generated at once, h x w pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flashar_pl.backbones.condition import Batch
from flashar_pl.decoding.samples import Drawn, draw
from flashar_pl.metrics.collector import DistributionMetrics
from flashar_pl.metrics.features import FeatureExtractor, extract_features, load_extractor
from flashar_pl.metrics.reference import load_reference
from flashar_pl.pictures import gate_picture, save_png, tile
from flashar_pl.tokenizers import Tokenizer, build_tokenizer
from flashar_pl.training.validation import LossSums, SampleConditions, for_sampling, sample_set

if TYPE_CHECKING:
    from flashar_pl.training.module import FlashARModule


SCORES = ("val/fid", "val/is", "val/accuracy")
"""What only those validations give that `fid_every` chooses."""


class Evaluation(Callback):
    """Losses, likelihood and gate of a split; sample grid, FID, Inception Score and class accuracy of generated images.

    Everything is measured on the averaged weights where the run keeps them. Results are equal on every rank, and the
    number of ranks changes none of them. Where a split has several grids, the losses are over all of them, samples and
    gate pictures of its first one. Logged under val/ or test/; pictures go to TensorBoard and, as PNG, to
    `samples/` and `gate/` in the log directory.
    """

    def __init__(self) -> None:
        self.validations = 0
        """Validations of the fit so far."""
        self.loaded_step = 0
        """Optimizer steps of the checkpoint that was loaded, for the names of pictures."""
        self.extractor: FeatureExtractor | None = None
        self.tokenizer: Tokenizer | None = None
        self.metrics: dict[str, DistributionMetrics] = {}
        """One for each split: its real images are seen once."""
        self.sums: LossSums | None = None
        self.conditions: SampleConditions | None = None
        self._counts_real = False

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = int(state_dict["validations"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loaded_step = int(checkpoint.get("global_step", 0))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load tokenizer, extractor and reference now: what is missing shows before training, not after an epoch."""
        config = _as_ours(pl_module).validation
        if stage == "predict" or not (config.samples or config.grid_images) or self.tokenizer is not None:
            return
        _check_monitors(trainer, config.fid_every)
        manifest = _as_ours(pl_module).manifest
        if manifest is None:
            raise ValueError(
                "validation.samples and grid_images need a data module with a manifest, whose tokenizer decodes them."
            )
        self.tokenizer = build_tokenizer(manifest.tokenizer)
        if config.features is not None:
            self.extractor = load_extractor(config.features)
            self.metrics = {split: self._new_metrics(config.reference) for split in ("val", "test")}

    def _new_metrics(self, reference: str | None) -> DistributionMetrics:
        assert self.extractor is not None
        names = ["fid", "is"] if self.extractor.num_classes else ["fid"]
        metrics = DistributionMetrics(self.extractor, names=names)
        if reference is not None:
            metrics.set_reference(load_reference(reference, self.extractor))
        return metrics

    # --- the same for validation and test ---------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_as_ours(pl_module), "val", trainer.sanity_checking)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_as_ours(pl_module), "test", False)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(_as_ours(pl_module), "val", outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(_as_ours(pl_module), "test", outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations += trainer.state.fn == TrainerFn.FITTING
            self._finish(trainer, _as_ours(pl_module), "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, _as_ours(pl_module), "test")

    def _begin(self, module: FlashARModule, split: str, sanity: bool) -> None:
        self.sums = None
        self.conditions = SampleConditions(module.net, max(module.validation.samples, module.validation.grid_images))
        metrics = self.metrics.get(split)
        self._counts_real = metrics is not None and not metrics.fid.has_reference and not sanity

    def _add(self, module: FlashARModule, split: str, losses: dict[str, Tensor], batch: Batch) -> None:
        plan = module.evaluation_plan(batch.codes)
        if self.sums is None:
            self.sums = LossSums(plan, batch.codes.device)
        self.sums.add(losses, batch.valid, plan)
        if not self.sums.same_grid(plan):
            return  # samples are drawn, and compared with real images, on the split's first grid
        if self._samples_wanted(module):
            assert self.conditions is not None
            self.conditions.collect(batch.condition, batch.index, batch.valid)
        if self._counts_real:
            assert self.tokenizer is not None
            assert self.extractor is not None
            images = self.tokenizer.to(batch.codes.device).decode(batch.codes)
            rows = extract_features(self.extractor.to(batch.codes.device), images).pool
            self.metrics[split].to(rows.device).fid.update(rows, real=True, valid=batch.valid)

    def _samples_wanted(self, module: FlashARModule) -> bool:
        return bool(module.validation.samples or module.validation.grid_images)

    def _finish(self, trainer: Trainer, module: FlashARModule, split: str) -> None:
        assert self.sums is not None, "no batch was seen"
        results = self.sums.reduce(lambda values: _sum(trainer, values))
        if self._samples_wanted(module):
            results |= self._sample(trainer, module, split)
        for name, value in results.items():
            shown = split == "val" and name == "nll"
            module.log(f"{split}/{name}", value, prog_bar=shown, sync_dist=True, batch_size=1)
        if "gate_mean" in results:
            self._show(trainer, module, f"{split}/gate_map", "gate", gate_picture(self.sums.gate_map.cpu()))

    # --- samples ----------------------------------------------------------------------------------------------------

    def _sample(self, trainer: Trainer, module: FlashARModule, split: str) -> dict[str, float]:
        """Generate; log the grid; return fid, is and accuracy where they are due."""
        config = module.validation
        fitting = trainer.state.fn == TrainerFn.FITTING
        measured = config.samples if not fitting or self.validations % config.fid_every == 0 else 0
        n = max(measured, config.grid_images)
        if n == 0:
            return {}
        assert self.sums is not None
        assert self.conditions is not None
        assert self.tokenizer is not None
        metrics = self.metrics[split].to(module.device) if measured else None
        if metrics is not None:
            metrics.reset()  # generated rows only: real ones stay
        hits = torch.zeros(2, dtype=torch.float64, device=module.device)  # right, judged
        sheet: Tensor | None = None
        samples = sample_set(config, n, self.sums.plan, self.conditions.join())
        batches = samples.batches_of_rank(trainer.global_rank, trainer.world_size)
        tokenizer = self.tokenizer.to(module.device)
        extractor = None if metrics is None or self.extractor is None else self.extractor.to(module.device)
        model = for_sampling(module.evaluated, str(trainer.precision))
        for drawn in draw(model, tokenizer, samples, batches, extractor):
            if metrics is not None:
                hits += self._measure(metrics, drawn, drawn.index < measured)
            if sheet is None:
                sheet = drawn.images.new_zeros(config.grid_images, *drawn.images.shape[1:], dtype=torch.int32)
            shown = drawn.index < config.grid_images
            sheet[drawn.index[shown]] = drawn.images[shown.to(sheet.device)].to(torch.int32)
        self._show_sheet(trainer, module, split, sheet)
        return {} if metrics is None else self._scores(trainer, metrics, hits)

    def _measure(self, metrics: DistributionMetrics, drawn: Drawn, judged: Tensor) -> Tensor:
        """Add the judged (b,) bool samples to the metrics; returns (right, judged) class predictions."""
        assert self.conditions is not None
        assert drawn.features is not None
        metrics.update(drawn.features, drawn.index, valid=judged)
        logits, classes = drawn.features.logits, self.conditions.classes
        hits = torch.zeros(2, dtype=torch.float64, device=drawn.images.device)
        if logits is not None and classes is not None and logits.shape[1] == classes:
            right = logits.argmax(1).cpu() == drawn.index % classes
            hits += torch.stack([right[judged].sum(), judged.sum()]).to(hits)
        return hits

    def _scores(self, trainer: Trainer, metrics: DistributionMetrics, hits: Tensor) -> dict[str, float]:
        right, judged = _sum(trainer, hits).tolist()
        scores = metrics.compute()
        if judged:
            scores["accuracy"] = right / judged
        return scores

    def _show_sheet(self, trainer: Trainer, module: FlashARModule, split: str, sheet: Tensor | None) -> None:
        """Join the ranks' parts of the sample grid and show it. A rank without samples has none."""
        if not module.validation.grid_images:
            return
        assert self.tokenizer is not None
        assert self.sums is not None
        if sheet is None:
            scale = self.tokenizer.downsample
            size = (self.sums.plan.height * scale, self.sums.plan.width * scale)
            sheet = torch.zeros(module.validation.grid_images, 3, *size, dtype=torch.int32, device=module.device)
        images = _sum(trainer, sheet).to(torch.uint8).cpu()
        self._show(trainer, module, f"{split}/samples", "samples", tile(images))

    def _show(self, trainer: Trainer, module: FlashARModule, tag: str, folder: str, image: Tensor) -> None:
        """A picture (3, h, w) uint8 for TensorBoard and as PNG."""
        directory = trainer.log_dir  # every rank asks: it is broadcast
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, image.numpy(), trainer.global_step)
        if directory is not None:
            name, step = tag.split("/")[0], trainer.global_step
            fn = trainer.state.fn
            if fn is not None and fn != TrainerFn.FITTING:  # counts no steps; the pictures of the fit stay
                name, step = fn.value, self.loaded_step
            save_png(image, Path(directory) / folder / f"{name}_step_{step:07d}.png")


def _check_monitors(trainer: Trainer, fid_every: int) -> None:
    """ValueError if a callback asks for a value in every validation that only some of them give: it would end the run
    at the first one without it."""
    sparse = [name for c in trainer.callbacks if (name := getattr(c, "monitor", None)) in SCORES]  # type: ignore[attr-defined]
    if fid_every > 1 and sparse:
        raise ValueError(
            f"validation.fid_every is {fid_every}, but a callback monitors {sparse[0]}, which not every validation has "
            "then; expected fid_every 1, or another monitor, such as val/nll."
        )


def _sum(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum over ranks."""
    return trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]


def _as_ours(module: LightningModule) -> FlashARModule:
    return cast("FlashARModule", module)
