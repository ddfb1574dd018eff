"""What a validation or test measures on generated images: a sample grid, FID, Inception Score, class accuracy.

Shapes: B samples, H, W grid, b samples generated at once, h x w pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flashar_pl.backbones.condition import Batch
from flashar_pl.decoding.samples import Drawn, draw
from flashar_pl.grid import DecodePlan
from flashar_pl.metrics.collector import DistributionMetrics
from flashar_pl.metrics.features import FeatureExtractor, extract_features, load_extractor
from flashar_pl.metrics.reference import load_reference
from flashar_pl.pictures import tile
from flashar_pl.tokenizers import Tokenizer, build_tokenizer
from flashar_pl.training.config import ValidationConfig
from flashar_pl.training.evaluation import SplitCallback, sum_over_ranks
from flashar_pl.training.protocol import Trained, trained
from flashar_pl.training.validation import SampleConditions, for_sampling, sample_set

SCORES = ("val/fid", "val/is", "val/accuracy")
"""What only those validations give that `fid_every` chooses."""


class DrawnSamples(SplitCallback):
    """Draws samples on the first grid of a split, from the averaged weights where the run keeps them.

    Results are equal on every rank, and the number of ranks changes none of them.
    """

    def __init__(self, config: ValidationConfig) -> None:
        self.config = config
        self.validations = 0
        """Validations of the fit so far."""
        self.extractor: FeatureExtractor | None = None
        self.tokenizer: Tokenizer | None = None
        self.metrics: dict[str, DistributionMetrics] = {}
        """One for each split: its real images are seen once."""
        self.conditions: SampleConditions
        self.plan: DecodePlan | None = None
        """Of the split's first grid."""
        self._counts_real = False

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = int(state_dict["validations"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load tokenizer, extractor and reference now: what is missing shows before training, not after an epoch."""
        config = self.config
        if stage == "predict" or self.tokenizer is not None:
            return
        _check_monitors(trainer, config.fid_every)
        manifest = trained(pl_module).manifest
        if manifest is None:
            raise ValueError(
                "validation.samples and grid_images need a data module with a manifest, whose tokenizer decodes them."
            )
        self.tokenizer = build_tokenizer(manifest.tokenizer)
        if config.features is not None:
            self.extractor = load_extractor(config.features)
            self.metrics = {split: _new_metrics(self.extractor, config.reference) for split in ("val", "test")}

    def begin(self, trainer: Trainer, module: Trained, split: str) -> None:
        self.plan = None
        self.conditions = SampleConditions(module.net, max(self.config.samples, self.config.grid_images))
        metrics = self.metrics.get(split)
        self._counts_real = metrics is not None and not metrics.fid.has_reference and not trainer.sanity_checking

    def add(self, module: Trained, split: str, losses: dict[str, Tensor], batch: Batch) -> None:
        plan = module.evaluation_plan(batch.codes)
        self.plan = self.plan or plan
        if (plan.height, plan.width) != (self.plan.height, self.plan.width):
            return  # samples are drawn, and compared with real images, on the split's first grid
        self.conditions.collect(batch.condition, batch.index, batch.valid)
        if self._counts_real:
            assert self.tokenizer is not None
            assert self.extractor is not None
            images = self.tokenizer.to(batch.codes.device).decode(batch.codes)
            rows = extract_features(self.extractor.to(batch.codes.device), images).pool
            self.metrics[split].to(rows.device).fid.update(rows, real=True, valid=batch.valid)

    def finish(self, trainer: Trainer, module: Trained, split: str) -> dict[str, float]:
        """Generate; show the grid; return fid, is and accuracy where they are due."""
        config, fitting = self.config, trainer.state.fn == TrainerFn.FITTING
        self.validations += fitting and split == "val"
        measured = config.samples if not fitting or self.validations % config.fid_every == 0 else 0
        n = max(measured, config.grid_images)
        if n == 0:
            return {}
        assert self.plan is not None
        assert self.tokenizer is not None
        device = trainer.strategy.root_device
        metrics = self.metrics[split].to(device) if measured else None
        if metrics is not None:
            metrics.reset()  # generated rows only: real ones stay
        hits = torch.zeros(2, dtype=torch.float64, device=device)  # right, judged
        size = [side * self.tokenizer.downsample for side in (self.plan.height, self.plan.width)]
        sheet = torch.zeros(config.grid_images, 3, *size, dtype=torch.int32, device=device)  # this rank's part
        samples = sample_set(config, n, self.plan, self.conditions.join())
        batches = samples.batches_of_rank(trainer.global_rank, trainer.world_size)
        extractor = None if metrics is None or self.extractor is None else self.extractor.to(device)
        model = for_sampling(module.evaluated, str(trainer.precision))
        for drawn in draw(model, self.tokenizer.to(device), samples, batches, extractor):
            if metrics is not None:
                hits += self._measure(metrics, drawn, drawn.index < measured)
            shown = drawn.index < config.grid_images
            sheet[drawn.index[shown]] = drawn.images[shown.to(sheet.device)].to(torch.int32)
        if config.grid_images:
            images = sum_over_ranks(trainer, sheet).to(torch.uint8).cpu()
            self.show(trainer, f"{split}/samples", "samples", tile(images))
        if metrics is None:
            return {}
        right, judged = sum_over_ranks(trainer, hits).tolist()
        return metrics.compute() | ({"accuracy": right / judged} if judged else {})

    def _measure(self, metrics: DistributionMetrics, drawn: Drawn, judged: Tensor) -> Tensor:
        """Add the judged (b,) bool samples to the metrics; returns (right, judged) class predictions."""
        assert drawn.features is not None
        metrics.update(drawn.features, drawn.index, valid=judged)
        logits, classes = drawn.features.logits, self.conditions.classes
        hits = torch.zeros(2, dtype=torch.float64, device=drawn.images.device)
        if logits is not None and classes is not None and logits.shape[1] == classes:
            right = logits.argmax(1).cpu() == drawn.index % classes
            hits += torch.stack([right[judged].sum(), judged.sum()]).to(hits)
        return hits


def _new_metrics(extractor: FeatureExtractor, reference: str | None) -> DistributionMetrics:
    metrics = DistributionMetrics(extractor, names=["fid", "is"] if extractor.num_classes else ["fid"])
    if reference is not None:
        metrics.set_reference(load_reference(reference, extractor))
    return metrics


def _check_monitors(trainer: Trainer, fid_every: int) -> None:
    """ValueError if a callback asks for a value in every validation that only some of them give: it would end the run
    at the first one without it."""
    sparse = [name for c in trainer.callbacks if (name := getattr(c, "monitor", None)) in SCORES]  # type: ignore[attr-defined]
    if fid_every > 1 and sparse:
        raise ValueError(
            f"validation.fid_every is {fid_every}, but a callback monitors {sparse[0]}, which not every validation has "
            "then; expected fid_every 1, or another monitor, such as val/nll."
        )
