"""What is checked before a run does anything long."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from flashar_pl.backbones import Backbone
from flashar_pl.backbones.registry import home_of
from flashar_pl.checkpoints.repositories import locate
from flashar_pl.image_files import EXTENSIONS
from flashar_pl.metrics.inception import WEIGHTS_FILE
from flashar_pl.models.lora import LoraConfig
from flashar_pl.models.losses import AUX_WEIGHT
from flashar_pl.recipes import recipes
from flashar_pl.text_files import read_text, read_yaml
from flashar_pl.tokenizers.files import RECIPE_WEIGHTS
from flashar_pl.training.config import FlashARConfig, ValidationConfig
from flashar_pl.training.stages import Schedule

WEIGHTS_HOME = "https://github.com/toshas/torch-fidelity/releases"


def initial_weights(path: str) -> str:
    """Where the weights of `path` are, a local path or a repository in the Hub cache. ValueError if nowhere: what was
    looked for and how to get it."""
    given = Path(path).expanduser()
    try:
        found = locate(path)
        if Path(found).exists():
            return found
        unlocated = None
    except ValueError as error:
        unlocated = error
    if (home := home_of(given.name)) is not None:
        how = f"Download {given.name} from {home} to {given.parent}/."
    elif (recipe := recipe_of_run(given.parent.parent)) is not None:
        how = f"It is made by: flashar fit --config {recipe}"
    elif unlocated is not None:
        raise ValueError(f"model.init_from: {unlocated}") from unlocated
    else:
        how = "A raster checkpoint is made by a raster run, such as: flashar fit --config experiments/demo_raster.yaml"
    raise ValueError(f"model.init_from: no file {given}. {how}")


def check_features(path: str | None, shards: str | dict[str, float] | None) -> None:
    """ValueError if there are no weights of a feature extractor at `path`. shards: of the run."""
    if path is None or Path(path).expanduser().exists():
        return
    if Path(path).name == WEIGHTS_FILE:
        how = f"Download {WEIGHTS_FILE} from {WEIGHTS_HOME} to {Path(path).parent}/, or leave samples and features out."
    else:
        data = shards if isinstance(shards, str) else next(iter(shards or ["SHARDS"]))
        how = f"For tiny images a classifier's features do: flashar classifier --data {data} --out {path}"
    raise ValueError(f"model.validation.features: nothing at {path}. {how}")


def recipe_of_run(directory: Path) -> str | None:
    """The recipe of experiments/ that trains in a run directory."""
    for path in sorted(recipes()):
        if Path((read_yaml(path).get("trainer") or {}).get("default_root_dir", "")) == directory:
            return f"experiments/{path.name}"
    return None


def _in_header(shards: str) -> str | None:
    """The command that makes `shards`, as the header of a recipe says that trains on them."""
    for path in recipes():
        header = re.sub(r"\\\n# +", "", read_text(path))
        command = re.search(r"^# +(flashar tokenize .+)$", header, re.M)
        if command and (read_yaml(path).get("data") or {}).get("shards") == shards:
            return command[1]
    return None


def how_to_make(shards: str, backbone: Backbone) -> str:
    """The command that makes the shards a model trains on, at the place where they are looked for."""
    place, out = Path(shards), shlex.quote(shards)
    files = islice(chain(place.glob("*"), place.glob("*/*")), 1000)
    if sum(path.suffix.lower() in EXTENSIONS for path in files) > 2:  # pictures were given for shards
        return f"flashar tokenize images {out} --out data/mine, and train with --data.shards data/mine"
    if place.name in ("digits", "moving_digits", "scenes"):
        return f"flashar tokenize {place.name.replace('_', '-')} --out {out}"
    if place.parent.name.endswith("_tiny"):
        return f"python tests/training/emu_tiny_data.py {place.parent}"
    if (command := _in_header(shards)) is not None:
        return command
    weights, kind = RECIPE_WEIGHTS.get(backbone.vocabulary), backbone.conditioning.kind
    if weights is not None and kind == "prompt":
        above = place.parent if re.fullmatch(r"\d+x\d+", place.name) else place
        square = " --crop square" if above != place else ""
        out = shlex.quote(str(above))
        return f"flashar tokenize text-image --data text_to_image.json{square} --out {out} --weights {weights}"
    if weights is not None and kind == "class":
        size = found[1] if (found := re.search(r"_(\d{3})$", place.name)) else "256"
        return (
            f"flashar tokenize imagenet --images imagenet/train --image-size {size} --ten-crop --out {out} "
            f"--weights {weights}"
        )
    if kind == "prompt":
        return f"flashar tokenize text-image --data text_to_image.json --out {out} --weights TOKENIZER"
    return f"flashar tokenize images photos --out {out}"


def check_model(
    lora: LoraConfig | None, flashar: FlashARConfig | None, init_from: str | None, aux_weight: float
) -> None:
    """ValueError for a negative weight of the auxiliary losses, for LoRA on a raster model or on random weights, and
    for an intra-diagonal head that would train nothing, or alone on random weights."""
    if aux_weight < 0:
        raise ValueError(f"aux_weight is {aux_weight}; expected 0 or more (the paper has {AUX_WEIGHT}).")
    intra = None if flashar is None else flashar.intra
    if intra is not None and intra.groups == 1:
        raise ValueError("model.flashar.intra.groups is 1, which is off: it would not train; expected 2, 4 and so on.")
    if intra is not None and intra.alone and init_from is None:
        raise ValueError(
            "model.flashar.intra.alone freezes the rest and model.init_from is null, so it would stay random; expected "
            "a trained FlashAR model in model.init_from."
        )
    if lora is None:
        return
    if flashar is None:
        raise ValueError(
            "model.lora adapts a trained raster model that gets a vertical branch; give model.flashar, such as "
            "{branch_layer: 11}, or leave model.lora out."
        )
    if init_from is None:
        raise ValueError(
            "model.lora keeps the backbone as it is and model.init_from is null, so it would stay random; expected "
            "weights to start from, such as model.init_from: weights/c2i_B_256.pt."
        )


NOT_OURS: dict[type[Callback], str] = {
    LearningRateFinder: "every role has a rate of its own, scaled from model.optimiser.lr by the schedule. Compare "
    "short runs with other values of it.",
    GradientAccumulationScheduler: "intervals and the schedule count steps of one size. Set "
    "trainer.accumulate_grad_batches.",
    StochasticWeightAveraging: "it replaces the learning rates of the schedule. For averaged weights set "
    "model.ema_decay.",
}
"""Callbacks of Lightning that would make a run another than its configuration says, and what to do instead."""
PURE_HALF = ("bf16-true", "16-true", "transformer-engine-float16")


def check_trainer(trainer: Any, clip: float) -> None:
    """ValueError for a Trainer without float32 master weights, without batches, or with its own rates or clipping.

    clip: at which norm of the gradients the module clips.
    """
    if trainer.precision in PURE_HALF:
        raise ValueError(
            f"trainer.precision is {trainer.precision}: 16-bit weights would lose most updates at post-training "
            "learning rates; use bf16-mixed (16-bit compute, float32 weights) or 32-true."
        )
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; expected 1 or more.")
    for kind, why in NOT_OURS.items():
        if any(isinstance(each, kind) for each in trainer.callbacks):
            raise ValueError(f"trainer.callbacks has a {kind.__name__}; expected none: {why}")
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if value is not None or algorithm is not None:
        raise ValueError(
            f"trainer.gradient_clip_val is {value}, gradient_clip_algorithm {algorithm}; expected neither: the norm of "
            f"the gradients is clipped at model.optimiser.clip (now {clip})."
        )


def idle_parts(trainer: Trainer, schedule: Schedule, roles: Iterable[str]) -> list[str]:
    """What a run that starts would leave out without a word: validations, and the training of some of its roles."""
    notes, total = [], schedule.total_steps
    first, last = first_validation(trainer), total * trainer.accumulate_grad_batches
    if first is not None and first > last:
        notes.append(
            f"no validation: the first would come after batch {first:,.0f}, the run has {last:,}. Lower "
            f"trainer.val_check_interval (now {trainer.val_check_interval}) or check_val_every_n_epoch (now "
            f"{trainer.check_val_every_n_epoch})."
        )
    idle = [role for role in sorted(set(roles)) if not (schedule.trains(role, 0) or schedule.trains(role, total - 1))]
    if idle:
        notes.append(
            f"the learning rate of {', '.join(idle)} is 0 in all {total:,} steps: schedule.stage1_share is "
            f"{schedule.stage1_share}, backbone_factor {schedule.backbone_factor}."
        )
    if schedule.warmup > total:
        notes.append(
            f"the learning rate stays low: schedule.warmup is {schedule.warmup:,} steps, the run has {total:,}."
        )
    return notes


def first_validation(trainer: Trainer) -> float | None:
    """After how many batches of a fit the first validation comes; None = there is none, or a clock tells."""
    interval, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or trainer.fast_dev_run or interval is None:  # type: ignore[attr-defined]
        return None
    return interval if epochs is None else (epochs - 1) * trainer.num_training_batches + interval


def check_guidance(backbone: Backbone, validation: ValidationConfig) -> None:
    """ValueError if a validation would draw guided samples of a model that does not know its unconditional prompt."""
    draws, cfg_scale = validation.samples or validation.grid_images, validation.cfg_scale
    if draws and cfg_scale not in (None, 1) and not backbone.knows_null:
        raise ValueError(
            f"validation.cfg_scale is {cfg_scale}, but the model has no unconditional prompt; expected token ids in "
            "model.backbone.options.unconditional_prompt, or a model.backbone.directory with its prompts' tokenizer."
        )
