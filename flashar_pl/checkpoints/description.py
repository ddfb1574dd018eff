"""What a checkpoint says about itself: plain values, enough to build its model. Nothing in it is ever imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashar_pl.backbones import build_backbone
from flashar_pl.checkpoints.named_paths import all_inside, located, marks, named_paths, strange
from flashar_pl.grid import DecodePlan, make_plan
from flashar_pl.models.base import GridModel
from flashar_pl.models.baselines import PAR, VAR, BlockDiffusion
from flashar_pl.models.baselines.plans import block_plan, region_plan, scale_plan
from flashar_pl.models.baselines.var_transformer import VARTransformer
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.lora import LoraConfig
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.renames import on_meta

FORMAT = 1
FIELDS = {
    "raster": set(),
    "flashar": {"branch_layer", "vertical_layers", "fusion", "corner", "compatibility", "intra", "video"},
    "par": {"tokens_per_step"},
    "block_diffusion": {"strategy", "clean_context", "steps"},
    "var": set(),
}
"""Kinds of models, and what describes them besides their backbone."""


@dataclass
class Description:
    """What a checkpoint says about itself."""

    model: dict[str, Any]
    """Argument of `build_model`."""
    grid: tuple[int, int] | None = None
    """(H, W) it was trained on; None = unknown (official files)."""
    tokenizer: dict[str, Any] | None = None
    """Argument of `build_tokenizer`; None = unknown."""
    training: dict[str, Any] = field(default_factory=dict)
    """Step, stage and data of the run that wrote it."""
    lora: dict[str, Any] | None = None
    """`LoraConfig` of the weights beside this; None = a plain model's, as all that `load_model` returns."""
    strange: frozenset[str] = field(default=frozenset(), compare=False)
    """Paths in it that no command of this user wrote or typed; see `named_paths`."""

    @property
    def class_names(self) -> list[str]:
        """What the training data called its classes, by their ids; empty = not known."""
        names = self.training.get("class_names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with marks of the paths that are this user's."""
        values = asdict(self)
        own = named_paths(self.tokenizer, self.training) - values.pop("strange")
        if own_marks := marks(own):
            values["marks"] = own_marks
        return {"format": FORMAT, **values, "grid": None if self.grid is None else list(self.grid)}

    def settle(self, checkpoint: Path) -> None:
        """Say of strange paths that lie inside the checkpoint where they are; those are this user's from now on."""
        file = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint
        found = all_inside(file, self.strange)
        self.strange -= found.keys()
        if self.tokenizer is not None:
            self.tokenizer = located(self.tokenizer, found)
        if (prompts := self.training.get("prompts")) in found:
            self.training = {**self.training, "prompts": found[prompts]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Description:
        """Inverse of `to_dict`."""
        if values.get("format") != FORMAT:
            raise ValueError(f"the checkpoint has format {values.get('format')!r}; this version reads {FORMAT}.")
        if not isinstance(values.get("model"), dict):
            raise ValueError("the checkpoint does not describe its model.")
        grid, optional = values.get("grid"), {key: values.get(key) for key in ("tokenizer", "lora")}
        if grid is not None and not (
            isinstance(grid, list | tuple) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
        ):
            raise ValueError(f"the checkpoint's grid is {str(grid)[:60]}; expected two whole numbers above 0.")
        training, stored = values.get("training", {}), values.get("marks", {})
        for key, value in {**optional, "training": training, "marks": stored}.items():
            if not isinstance(value, dict if key in ("training", "marks") else dict | None):
                raise ValueError(f"the checkpoint's {key} is {str(value)[:60]!r}; expected named values.")
        paths = named_paths(optional["tokenizer"], training)
        return cls(
            model=values["model"],
            grid=None if grid is None else (grid[0], grid[1]),
            training=training,
            strange=strange(paths, stored),
            **optional,
        )


def check_layers(config: Any, field_name: str, tensors: int) -> None:
    """ValueError for a configuration of more layers than its file has tensors: to build them would take for ever."""
    layers = config.get(field_name) if isinstance(config, dict) else None
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{field_name} is {layers:,}, more than the {tensors:,} tensors; it describes another model.")


def lora_config(values: dict[str, Any]) -> LoraConfig:
    """Of plain values. ValueError for others than its fields."""
    try:
        return LoraConfig(**values)
    except TypeError as error:
        raise ValueError(f"the checkpoint's lora cannot be used: {error}.") from error


def build_model(config: dict[str, Any]) -> GridModel:
    """The model that `GridModel.config()` describes, with new weights."""
    values = dict(config)
    kind, described = values.pop("kind", None), values.pop("backbone", {})
    unknown = values.keys() - FIELDS.get(kind, set())
    if kind not in FIELDS or unknown or (kind == "flashar" and "branch_layer" not in values):
        raise ValueError(
            f'model kind is {kind!r} with {", ".join(values) or "no fields"}; expected "raster", "var", "par" with '
            f'tokens_per_step, "block_diffusion" with some of {", ".join(sorted(FIELDS["block_diffusion"]))}, or '
            f'"flashar" with branch_layer and some of {", ".join(sorted(FIELDS["flashar"]))}.'
        )
    backbone = build_backbone(described)
    if backbone.own_model != (kind if kind == "var" else None):
        raise ValueError(f"model kind is {kind!r} on a {backbone.kind} backbone; a var backbone and model go together.")
    if kind == "raster":
        return RasterAR(backbone)
    if kind == "par":
        return PAR(backbone, **values)
    if kind == "block_diffusion":
        return BlockDiffusion(backbone, **values)
    if kind == "var":
        assert isinstance(backbone, VARTransformer)
        return VAR(backbone)
    values.pop("compatibility", None)  # named the conventions of a released model once
    if values.get("corner") == "released":
        return ReleasedFlashAR(backbone, values["branch_layer"], values["vertical_layers"])
    return FlashAR(backbone, **values)


def plan_of(config: dict[str, Any], name: str, height: int, width: int, row_end: bool = False) -> DecodePlan:
    """The plan called `name` of the model that `config` describes; the baselines have one of their own."""
    if config["kind"] == "var":
        return scale_plan(tuple(config["backbone"]["patch_nums"]))
    if config["kind"] == "par":
        return region_plan(height, width, config["tokens_per_step"])
    if config["kind"] == "block_diffusion":
        return block_plan(height, width, config["strategy"])
    return make_plan(name, height, width, row_end, **config.get("video", {}))


def build_on_meta(config: dict[str, Any]) -> GridModel:
    """`build_model` without memory for weights. ValueError for any configuration that no model can be built from."""
    return on_meta(lambda: build_model(config))
