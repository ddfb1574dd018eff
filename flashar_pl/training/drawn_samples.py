"""What a validation or test measures on generated images: a sample grid, FID, Inception Score, class accuracy.

Shapes: B samples, H, W grid, b samples generated at once, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.encode import tokenizer_of
from flashar_pl.data.reader import ShardReader
from flashar_pl.data.shards import Manifest
from flashar_pl.decoding.samples import decode_all, draw
from flashar_pl.grid import DecodePlan
from flashar_pl.metrics.distribution import ADM_SPLIT_SIZE, inception_score
from flashar_pl.metrics.extractor import FeatureExtractor, extract_features
from flashar_pl.metrics.features import load_extractor
from flashar_pl.metrics.fid import RowFID
from flashar_pl.metrics.reference import load_reference
from flashar_pl.pictures import sheet
from flashar_pl.tokenizers import Tokenizer
from flashar_pl.training.config import ValidationConfig
from flashar_pl.training.evaluation import SplitCallback, sum_over_ranks
from flashar_pl.training.protocol import Trained, trained
from flashar_pl.training.validation import Chosen, SampleConditions, for_sampling, sample_set

SCORES = ("val/fid", "val/is", "val/accuracy")
"""What only those validations give that `fid_every` chooses."""
NO_SAMPLES = "model.validation.samples 0 and model.validation.grid_images 0"
"""How a run is told to draw none."""


SPLIT = {"val": "validation", "test": "test"}


class DrawnSamples(SplitCallback):
    """Draws samples on the first grid of a split, from the averaged weights where the run keeps them.

    Results are equal on every rank, and the number of ranks changes none of them.
    """

    def __init__(self, config: ValidationConfig) -> None:
        self.config = config
        self.validations = 0
        """Validations of the fit so far."""
        self.extractor: FeatureExtractor | None = None
        self.tokenizer: Tokenizer
        self.fid: dict[str, RowFID] = {}
        """One for each split: its real images are seen once."""
        self.sees_real = False
        self.conditions: SampleConditions
        self.plan: DecodePlan | None = None
        """Of the split's first grid."""

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = int(state_dict["validations"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load tokenizer, extractor and reference now: what is missing shows before training, not after an epoch."""
        config = self.config
        if stage == "predict" or hasattr(self, "tokenizer"):
            return
        _check_monitors(trainer, config.fid_every)
        manifest = trained(pl_module).manifest
        if manifest is None:
            raise ValueError(
                "validation.samples and grid_images need a data module with a manifest, whose tokenizer decodes them."
            )
        self.tokenizer = tokenizer_of(manifest, None, "--data.tokenizer_weights")
        self.tokenizer.check_decodes(f"set {NO_SAMPLES}")
        if config.features is not None:
            self.extractor = load_extractor(config.features)
            self.fid = {split: RowFID(self.extractor.num_features) for split in ("val", "test")}
            if config.reference is not None:
                reference = load_reference(config.reference, self.extractor)
                for metric in self.fid.values():
                    metric.set_reference(reference, trainer.global_rank)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the first validation would end on, hours later."""
        net = trained(pl_module).net
        if net.own_decoding and net.sharded:
            raise ValueError(
                f"a {net.config()['kind']} model in a sharded run cannot draw; set {NO_SAMPLES}, and measure its "
                "checkpoints with `flashar evaluate`."
            )

    def begin(self, trainer: Trainer, module: Trained) -> None:
        self.plan = None
        shown = self.config.grid_images
        self.conditions = SampleConditions(module.net, max(self.config.samples, shown), shown)
        self.sees_real = bool(self.fid) and not self.fid[self.split].has_real
        self.sees_real &= not trainer.sanity_checking or module.validation.at_start

    def add(self, module: Trained, losses: dict[str, Tensor], batch: Batch) -> None:
        plan = module.evaluation_plan(batch.codes)
        self.plan = self.plan or plan
        if (plan.height, plan.width) != (self.plan.height, self.plan.width):
            return  # samples are drawn, and compared with real images, on the split's first grid
        self.conditions.collect(batch)
        if self.sees_real:
            assert self.extractor is not None
            images = self.tokenizer.to(batch.codes.device).decode(batch.codes)
            rows = extract_features(self.extractor.to(batch.codes.device), images).pool
            self.fid[self.split].to(rows.device).update(rows if batch.valid is None else rows[batch.valid], real=True)

    def finish(self, trainer: Trainer, module: Trained) -> dict[str, float]:
        """Generate; show the grid; return fid, is and accuracy where they are due."""
        config, fitting = self.config, trainer.state.fn == TrainerFn.FITTING
        due = not fitting or (self.validations + 1) % config.fid_every == 0
        measured = config.samples if due else 0
        n = max(measured, config.grid_images)
        if n == 0:
            return {}
        assert self.plan is not None
        device = trainer.strategy.root_device
        extractor = None if self.extractor is None or not measured else self.extractor.to(device)
        classes = None if extractor is None else extractor.num_classes
        fid = self.fid[self.split].to(device) if extractor is not None else None
        if fid is not None:
            fid.reset()  # generated rows only: real ones stay
        size = [side * self.tokenizer.downsample for side in (self.plan.height, self.plan.width)]
        # this rank's part of what all draw together; the sum over ranks has every row once
        shown = torch.zeros(config.grid_images, 3, *size, dtype=torch.int32, device=device)
        logits = torch.zeros(measured, classes or 0, device=device)
        chosen = self.conditions.join()
        samples = sample_set(config, n, self.plan, chosen.condition)
        batches = samples.batches_of_rank(trainer.global_rank, trainer.world_size)
        model = for_sampling(module.evaluated, str(trainer.precision))
        for drawn in draw(model, self.tokenizer.to(device), samples, batches, extractor):
            parts = [(shown, drawn.images)]
            if fid is not None and drawn.features is not None:
                fid.update(drawn.features.pool[drawn.index < measured], real=False)
                parts += [] if drawn.features.logits is None else [(logits, drawn.features.logits)]
            for whole, rows in parts:
                inside = drawn.index < len(whole)
                whole[drawn.index[inside].to(device)] = rows[inside.to(device)].to(whole.dtype)
        if config.grid_images:
            images = sum_over_ranks(trainer, shown).to(torch.uint8).cpu()
            self.show(trainer, f"{self.split}/samples", "samples", self.picture(module.manifest, chosen, images))
        if fid is None:
            return {}
        logits = sum_over_ranks(trainer, logits)
        scores: dict[str, Callable[[], float]] = {"fid": lambda: float(fid.compute())}
        if classes:
            scores["is"] = lambda: inception_score(logits, split_size=ADM_SPLIT_SIZE, kind="logits")
        if classes and classes == self.conditions.classes:
            wanted = torch.arange(measured, device=device) % classes
            scores["accuracy"] = lambda: float((logits.argmax(1) == wanted).double().mean())
        return self.measure(trainer, scores)

    def picture(self, manifest: Manifest, chosen: Chosen, images: Tensor) -> Tensor:
        """Samples (n, 3, h, w) uint8 below real images of the split and the classes or captions: (3, h', w') uint8."""
        numbers = chosen.numbers[: len(images)]
        if self.conditions.classes is not None:
            heads = [manifest.class_name(number) for number in numbers]
        elif manifest.condition.kind == "text" and (split := SPLIT[self.split]) in manifest.splits:
            reader = ShardReader(manifest, split, verify=False)  # the loader has verified it
            heads = reader.read(np.array(numbers)).texts or []
        else:
            heads = [str(number) for number in numbers]
        blocks = [("samples", images)]
        if chosen.real:
            real = torch.full((len(numbers), *images.shape[1:]), 255, dtype=torch.uint8)  # white where none was seen
            found = {i: chosen.real[number] for i, number in enumerate(numbers) if number in chosen.real}
            real[list(found)] = decode_all(self.tokenizer, torch.stack(list(found.values())))
            blocks.insert(0, ("real", real))
        return sheet(blocks, heads)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validations += 1


def _check_monitors(trainer: Trainer, fid_every: int) -> None:
    """ValueError if a callback asks for a value in every validation that only some of them give: it would end the run
    at the first one without it."""
    sparse = [name for c in trainer.callbacks if (name := getattr(c, "monitor", None)) in SCORES]  # type: ignore[attr-defined]
    if fid_every > 1 and sparse:
        raise ValueError(
            f"validation.fid_every is {fid_every}, but a callback monitors {sparse[0]}, which not every validation has "
            "then; expected fid_every 1, or another monitor, such as val/nll."
        )
