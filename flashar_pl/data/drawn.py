"""A model's own samples as shards of codes: what post-training takes where no images are at hand.

Shapes: N samples in all, n of one pass, H x W grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashar_pl.backbones.condition import ClassIds
from flashar_pl.checkpoints.opening import Source as Opened
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.data.account import Account
from flashar_pl.data.manifest import ConditionSpec
from flashar_pl.data.order import permutation, stream
from flashar_pl.data.sources import Source
from flashar_pl.data.tokenise import Job
from flashar_pl.decoding.build import EXACT, build_engine
from flashar_pl.decoding.prompts import Wanted
from flashar_pl.decoding.request import DrawRequest
from flashar_pl.decoding.samples import SampleSet, draw_both
from flashar_pl.options import (
    CodeOptions,
    ModelOptions,
    SampleOptions,
    SamplingSettings,
    ShapeOptions,
    ShardOptions,
    SplitOptions,
    TextOptions,
)
from flashar_pl.text_files import naming, read_field


class Asked(Source):
    """Samples that are still to be drawn: sample i has the class or the prompt of entry `order[i]`, so that a part
    holds all of them mixed. Its bytes are its number."""

    def __init__(self, wanted: Wanted, num_classes: int, names: tuple[str, ...]) -> None:
        self.account = Account(used=len(wanted))
        self.order = permutation(stream(0, 4), len(wanted))
        self._values: list[Any]
        if wanted.prompts is not None:
            self.condition, self._values = ConditionSpec("text"), wanted.prompts
        else:
            assert isinstance(wanted.condition, ClassIds)
            self.condition = ConditionSpec("class", num_classes=num_classes)
            self._values, self.class_names = wanted.condition.ids.tolist(), names
            if num_classes in self._values:
                raise ValueError(f"class {num_classes} stands for none; expected 0 to {num_classes - 1}.")

    def __len__(self) -> int:
        return len(self.order)

    def where(self, index: int) -> str:
        return f"sample {index}"

    def read(self, index: int) -> tuple[bytes, int | str]:
        return str(index).encode(), self._values[self.order[index]]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self._values).encode()).hexdigest()[:16]


class Drawer:
    """Draws the samples of one pass: numbers (n, H, W), equal within a sample, -> codes (n, 1, H, W) int64."""

    def __init__(self, opened: Opened, asked: DrawRequest, order: np.ndarray, engine: CodeOptions, size: int) -> None:
        self.asked, self.order, self.size = asked, order, size
        self.engine = build_engine(opened, engine, asked.plan)
        self.smaller: Tensor | None = None

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        asked, wanted = self.asked, self.asked.wanted
        own = numbers[:, 0, 0]
        assert (np.diff(own) == 1).all(), own  # as a job that keeps the order hands them over
        entries = self.order[own].tolist()
        nulls = None if wanted.unconditional is None else wanted.unconditional.rows(entries)
        samples = SampleSet(
            wanted.condition.rows(entries), asked.grid, asked.plan, asked.sampling, self.size,
            asked.seed + int(own[0]), nulls,
        )  # fmt: skip
        codes, self.smaller = draw_both(self.engine, samples, 0)
        return codes[: len(own), None].cpu().numpy()

    def previews(self, numbers: np.ndarray, grid: tuple[int, int]) -> np.ndarray | None:
        """Codes (n, 1, h, w) of the previews that the call with the same numbers drew; None where it drew none."""
        return None if self.smaller is None else self.smaller[: len(numbers), None].cpu().numpy()


def check_seeds(out: Path, split: str, seeds: range) -> None:
    """ValueError where another split at `out` was drawn from some of these seeds: a sample may be in both."""
    for report in sorted(out.glob("tokenize-*.json")):
        made = read_field(report, "settings", dict)
        if report.name == f"tokenize-{split}.json" or "checkpoint_sha256" not in made:
            continue
        with naming(report):
            there = range(made["seed"], made["seed"] + made["samples"])
        if there.start < seeds.stop and seeds.start < there.stop:
            raise ValueError(
                f"the samples of {report} have seeds {there.start} to {there.stop - 1}, these {seeds.start} to "
                f"{seeds.stop - 1}; expected others for each split: --seed {there.stop}"
            )


def drawn_job(
    draw: SampleOptions,
    model: ModelOptions,
    sampling: SamplingSettings,
    shape: ShapeOptions,
    text: TextOptions,
    engine: CodeOptions,
    shards: SplitOptions,
    digest: str,
    device: torch.device,
) -> Job:
    """Samples of a checkpoint, `engine.batch_size` at a time.

    digest: of the checkpoint, for restarts.

    Raises ValueError for text features, which have no text that shards could hold, and as `DrawRequest.of` does.
    """
    if draw.text_features is not None:
        raise ValueError("shards hold captions, not --text-features; give --prompts and --text-encoder.")
    engine = replace(engine, device=str(device))
    opened = open_checkpoint(model, engine)
    asked = DrawRequest.of(opened, draw, sampling, shape, text, engine.plan)
    backbone, size = opened.model.backbone, engine.batch_size
    assert isinstance(size, int)
    if opened.model.reads_tokenizer:
        raise ValueError(f"{model.checkpoint} draws codes that are no grid; FlashAR has nothing to train on there.")
    check_seeds(Path(shards.out), shards.split, range(asked.seed, asked.seed + len(asked.wanted)))
    source = Asked(asked.wanted, backbone.conditioning.size, tuple(opened.description.class_names))
    drawer = Drawer(opened, asked, source.order, engine, size)
    elsewhere = opened.tokenizer is None and backbone.conditioning.kind == "prompt"  # another program decodes them
    return Job(
        ShardOptions(**asdict(shards), workers=0, on_bad_sample="stop", keep_order=True),
        source,
        lambda data: np.full(asked.grid, int(data)),
        encode=drawer,
        previews=drawer.previews,
        name=Path(shards.out).name,
        tokenizer={"kind": "ibq"} if elsewhere else opened.need_tokenizer(),  # as ready codes have it
        vocabulary=backbone.vocabulary,
        batch=size,
        settings={
            "checkpoint_sha256": digest,
            "weights": opened.kind,
            "n_head": model.n_head,
            "grid": asked.grid,
            "dtype": opened.dtype,
            "weight_format": "plain" if engine.weight_format in EXACT else engine.weight_format,
            "plan": asked.plan,
            **asdict(asked.sampling),
            "seed": asked.seed,
            "batch_size": size,
            **asdict(text),
            "groups": model.groups,
            "branch_layer": model.branch_layer,
        },
        grid=asked.grid,
    )
