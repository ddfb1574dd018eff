"""The planner's view of a training configuration: its model, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashar_pl.planner.sizes import ModelSizes, model_sizes
from flashar_pl.planner.training import TrainingSetup
from flashar_pl.text_files import read_json
from flashar_pl.training.config import BackboneConfig, typed_settings
from flashar_pl.training.lightning_cli import parsed_config
from flashar_pl.training.module import FlashARModule

IMAGENET = 1_281_167
"""Training images of ImageNet, for epochs of shards that are not there yet."""
BATCH = 64
"""Samples of a forward where a data module of the user's has no batch size."""


@dataclass
class PlannedRun:
    """What a file or a preset says."""

    sizes: ModelSizes
    setup: TrainingSetup
    notes: list[str]
    """What was assumed."""

    @classmethod
    def of_model(cls, sizes: ModelSizes, gpus: int, grid: tuple[int, int] | None = None) -> PlannedRun:
        """A model on its usual grid, unless told; one sample per GPU, sharded, checkpointed."""
        notes = [] if grid else [_assumed(sizes.backbone.usual_grid)]
        return cls(sizes, TrainingSetup(grid or sizes.backbone.usual_grid, gpus=gpus), notes)

    @classmethod
    def of_files(cls, paths: Sequence[str], gpus: int, batch: int | None = None) -> PlannedRun:
        """A training YAML, or several of which the later wins. batch: global batch of one forward in place of theirs.

        Raises:
            ValueError: no such file, not a training configuration, or a batch that the GPUs cannot share.
        """
        values = parsed_config([word for path in paths for word in ("--config", path)])
        model, data, trainer = values["model"], values["data"], values["trainer"]
        data = data["init_args"] if "class_path" in data else data
        if "class_path" in model["backbone"]:
            model["backbone"] = asdict(BackboneConfig.named(**model["backbone"]))
        module = FlashARModule(**typed_settings(model))
        sizes, notes = model_sizes(module.model_config), list[str]()
        accumulate, given = trainer["accumulate_grad_batches"], batch is not None
        batch = batch or data.get("batch_size", BATCH)
        if "batch_size" not in data and not given:
            notes.append(f"a global batch of {batch} assumed")
        if batch % gpus:
            up = -(-batch // gpus) * gpus
            raise ValueError(
                f"data.batch_size {batch} is the global batch and no multiple of {gpus} GPUs. Plan with --batch {up} "
                f"and fit with --data.batch_size {up}, which the Slurm template does where BATCH={up} is set."
            )
        if batch != data.get("batch_size", batch):
            notes.append(
                f"a global batch of {batch} in place of the file's {data['batch_size']}: as many samples take "
                f"{data['batch_size'] / batch:g} of its steps"
            )
        grid = _grid(sizes, data.get("shards") or "", notes)
        if sizes.config.get("clean_context"):
            grid = (2 * grid[0], grid[1])
            notes.append("the clean copy counted as a second image")
        setup = TrainingSetup(
            grid=grid,
            plan="diagonal" if sizes.flashar else "raster",
            gpus=gpus,
            samples=batch // gpus,
            accumulate=accumulate,
            ema=module.ema_decay is not None,
            lora=module.lora,
            total_steps=_steps(trainer, batch * accumulate, notes),
            stage1_share=module.schedule.stage1_share or 0.0,
            moments=module.optimiser.state,
            **_strategy(trainer),
        )
        return cls(sizes, setup, notes)


def _strategy(trainer: dict[str, Any]) -> dict[str, Any]:
    """Sharding, replicas, compute dtype, checkpointing, offloading and writing from the trainer section."""
    strategy = trainer["strategy"]
    if not isinstance(strategy, dict) or not strategy["class_path"].endswith("ShardedStrategy"):
        return {"sharded": False, "mixed": "bf16" in str(trainer["precision"]), "checkpointing": False}
    options = strategy["init_args"]
    return {
        "replicas": options["replicas"],
        "mixed": options["compute"] == "bf16",
        "checkpointing": options["recompute"],
        "offload": options["offload"],
        "background": options["background"],
    }


def _stored_grid(path: Path) -> tuple[int, int]:
    """(H, W) of a manifest. ValueError where it says none."""
    match read_json(path).get("grid"):
        case [int(height), int(width)] if min(height, width) > 0:
            return height, width
        case other:
            raise ValueError(f"{path} has the grid {str(other)[:60]}; expected two whole numbers above 0.")


def _grid(sizes: ModelSizes, shards: str | dict[str, float], notes: list[str]) -> tuple[int, int]:
    """The grid of the shards: from their manifest, from a name such as imagenet_256, or the family's usual one."""
    places = [Path(each) for each in ([shards] if isinstance(shards, str) else shards) if each]
    manifests = [path for place in places for path in (place / "manifest.json", *sorted(place.glob("*/manifest.json")))]
    grids = [_stored_grid(path) for path in manifests if path.is_file()]
    if grids:
        height, width = max(grids, key=lambda grid: grid[0] * grid[1])
        if len(set(grids)) > 1:
            listed = ", ".join(map(str, places))
            notes.append(f"grid {height}x{width} is the largest of {len(set(grids))} in {listed}")
        return height, width
    if places and (found := re.search(r"_(\d{2,4})$", str(places[0]))):
        side = int(found[1]) // 16
        notes.append(f"grid {side}x{side} guessed from the name {places[0]} ({found[1]} pixels, 16 per code)")
        return side, side
    notes.append(_assumed(sizes.backbone.usual_grid))
    return sizes.backbone.usual_grid


def _assumed(grid: tuple[int, int]) -> str:
    return f"grid {grid[0]}x{grid[1]} assumed; give --grid for another one"


def _steps(trainer: dict[str, Any], batch: int, notes: list[str]) -> int:
    """Optimizer steps: max_steps, or epochs over the shards."""
    if trainer["max_steps"] > 0:
        return int(trainer["max_steps"])
    if trainer["max_epochs"]:
        notes.append(f"epochs counted with {IMAGENET:,} images (ImageNet)")
        return int(trainer["max_epochs"]) * (IMAGENET // batch)
    notes.append("50,000 steps assumed; give --steps for another number")
    return 50_000
