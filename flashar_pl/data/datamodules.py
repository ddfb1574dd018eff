"""The Lightning DataModule of code shards: wiring only; the order is in `order.py`, the state in `loader.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.grids import GridTraining, evaluation_batches, left_out, load_grids, training_batches
from flashar_pl.data.loader import EvaluationLoader, TrainingBatches, TrainingLoader
from flashar_pl.data.manifest import Manifest, check_matches
from flashar_pl.data.order import check_cut
from flashar_pl.data.prompt_encoder import PromptEncoder
from flashar_pl.tokenizers.text import MAX_PROMPT


class CodesDataModule(LightningDataModule):
    """Batches of codes from shards made by `flashar tokenize`.

    The order of training samples follows from the seed, the epoch and the shards alone: runs on any number of devices
    and workers see the same global batches, and a checkpoint continues exactly where it was saved, in the middle of an
    epoch too, on another number of devices or workers. The data is cut over devices here, whatever the Trainer's
    `use_distributed_sampler` says.

    Args:
        shards: where the shards and their manifest.json are: a directory, a URL, or `pipe:COMMAND` with {path} in it;
            or a directory of such directories, one for each grid, as `flashar tokenize text-image` writes them.
        batch_size: global training batch of one forward pass, over all devices; must be a multiple of their number.
            With gradient accumulation an optimiser step sees this many samples several times over.
        num_workers: worker processes of each device that read ahead; 0 reads in the training process.
        seed: seed of the order of training samples and of the choice of crops.
        window: blocks of the shards whose samples are shuffled together.
        validation_batch_size: global batch of validation, test and prediction; empty = batch_size.
        limit_validation_samples: validate on at most this many samples, spread evenly over the split; empty = all.
        cache: directory for copies of shards that are not local; empty = the user's cache directory.
        prompts: for shards with captions and an Emu3.5 model, directory with emu3.tiktoken, released with the weights.
        max_prompt: longest prompt in tokens, template included; longer captions lose their end.
        text_encoder: in place of prompts, turns a caption into the 1-D int64 token ids of the whole prefix.
    """

    def __init__(
        self,
        shards: str,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        window: int = 256,
        validation_batch_size: int | None = None,
        limit_validation_samples: int | None = None,
        cache: str | None = None,
        prompts: str | None = None,
        max_prompt: int = MAX_PROMPT,
        text_encoder: Callable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["text_encoder"], logger=False)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; expected 0 or more.")
        self.location = shards
        self.batch_size, self.num_workers, self.seed, self.window = batch_size, num_workers, seed, window
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.limit_validation_samples = limit_validation_samples
        self.cache, self.prompts, self.max_prompt, self.text_encoder = cache, prompts, max_prompt, text_encoder
        if prompts is not None and text_encoder is not None:
            raise ValueError("prompts and text_encoder are both given; expected one of them.")
        self._manifests: list[Manifest] = []
        self._training: TrainingLoader | None = None
        self._restored: dict[str, Any] = {}

    @property
    def manifests(self) -> list[Manifest]:
        """One manifest for each grid, read when first asked for. Raises ValueError as `load_grids` does."""
        if not self._manifests:
            self._manifests = load_grids(self.location)
        return self._manifests

    @property
    def manifest(self) -> Manifest:
        """The manifest of the shards; of several grids, that of the one with most training samples."""
        return self.manifests[0]

    def check_model(
        self,
        vocabulary: int,
        num_classes: int | None = None,
        text_width: int | None = None,
        visual_token_offset: int | None = None,
    ) -> None:
        """Raises ValueError unless a model can train on these shards; see `check_matches`.

        visual_token_offset: of an Emu3.5 model; the assets in `prompts` must have the same.
        """
        check_matches(self.manifest, vocabulary, num_classes, text_width=text_width)
        encoder = self._encoder(self.manifest)
        if isinstance(encoder, PromptEncoder):
            encoder.text.check_vocabulary(visual_token_offset)

    def _encoder(self, manifest: Manifest) -> Callable | None:
        """What turns captions of images of the manifest's grid into token ids; None for shards without captions."""
        if manifest.condition.kind != "text":
            return None
        if self.text_encoder is None and self.prompts is not None:
            self.text_encoder = PromptEncoder(self.prompts, manifest.grid, self.max_prompt)
        if self.text_encoder is None:
            raise ValueError(
                f"The shards of {manifest.name!r} hold captions: give text_encoder, or for Emu3.5 prompts: the "
                "directory with emu3.tiktoken, to turn them into ids."
            )
        if isinstance(self.text_encoder, PromptEncoder):
            return self.text_encoder.for_grid(manifest.grid)
        return self.text_encoder

    def setup(self, stage: str) -> None:
        """Check the settings against the shards and the devices before any long work. Raises ValueError."""
        _, ranks = self._rank()
        check_cut(self.validation_batch_size, ranks, "validation_batch_size")
        self._encoder(self.manifest)
        if stage == "fit":
            self._training, self._restored = None, {}
            check_cut(self.batch_size, ranks)
            training = [m for m in self.manifests if m.samples("train")] or [self.manifest]
            blocks, readers = sum(len(m.block_sizes("train")) for m in training), ranks * max(1, self.num_workers)
            if readers > blocks:
                smaller = max(1, sum(m.samples("train") for m in training) // readers)
                fewer = f"Set num_workers to at most {blocks // ranks}, or write" if blocks >= ranks else "Write"
                there = "1 block" if blocks == 1 else f"{blocks} blocks"
                raise ValueError(
                    f"{ranks} devices with {self.num_workers} workers each are {readers} readers, but the training "
                    f"split at {self.location} has {there}. {fewer} the shards again with smaller blocks "
                    f"(flashar tokenize ... --block {smaller})."
                )
            self._training_batches()
            for manifest in left_out(self.manifests, self.batch_size):
                rank_zero_warn(
                    f"{manifest.root} has {manifest.samples('train')} training samples, fewer than one batch of "
                    f"{self.batch_size}: they are left out."
                )

    def train_dataloader(self) -> TrainingLoader:
        """This device's training batches; the loader holds the place in the data."""
        batches, trainer = self._training_batches(), self.trainer
        processed = None
        if trainer is not None:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            processed = lambda: progress.current.processed  # type: ignore[attr-defined]  # noqa: E731
        place = self._restored if self._training is None else self._training.state_dict()
        self._training = TrainingLoader(batches, self.num_workers, processed)
        if place:
            self._training.load_state_dict(place)
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data. The Trainer saves it from the loader too, but after an epoch's last batch
        it does not restore that one."""
        return self._restored if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start training at a saved place, at the next `train_dataloader`."""
        self._training, self._restored = None, state_dict

    def val_dataloader(self) -> EvaluationLoader:
        """This device's validation batches, each sample once over all devices."""
        return self._evaluation("validation", self.limit_validation_samples)

    def test_dataloader(self) -> EvaluationLoader:
        """This device's test batches, each sample once over all devices."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """The test split, as `test_dataloader`."""
        return self._evaluation("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a `Batch` as a whole; anything else goes the Trainer's way."""
        if isinstance(batch, Batch):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _training_batches(self) -> TrainingBatches | GridTraining:
        trainer = self.trainer
        reshuffle = trainer is None or trainer.overfit_batches == 0  # type: ignore[attr-defined]
        order = (self.batch_size, self.seed, self.window)
        return training_batches(self.manifests, *order, *self._rank(), self._encoder, self.cache, reshuffle)

    def _evaluation(self, split: str, limit: int | None = None) -> EvaluationLoader:
        size = self.validation_batch_size
        batches = evaluation_batches(self.manifests, split, size, limit, *self._rank(), self._encoder, self.cache)
        return EvaluationLoader(batches, self.num_workers)

    def _rank(self) -> tuple[int, int]:
        """(this device's place, number) among those that see different data: tensor-parallel devices share theirs."""
        if self.trainer is None:
            return 0, 1
        cut = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return cut["rank"], cut["num_replicas"]
