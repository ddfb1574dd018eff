"""What a checkpoint says about itself: plain values, enough to build its model. Nothing in it is ever imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flashar_pl.backbones import build_backbone
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.raster import RasterAR
from flashar_pl.models.released import ReleasedFlashAR

FORMAT = 1
FIELDS = {"raster": set(), "flashar": {"branch_layer", "vertical_layers", "fusion", "corner", "compatibility"}}
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

    @property
    def class_names(self) -> list[str]:
        """What the training data called its classes, by their ids; empty = not known."""
        names = self.training.get("class_names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"format": FORMAT, **asdict(self), "grid": None if self.grid is None else list(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Description:
        """Inverse of `to_dict`."""
        if values.get("format") != FORMAT:
            raise ValueError(f"the checkpoint has format {values.get('format')!r}; this version reads {FORMAT}.")
        if not isinstance(values.get("model"), dict):
            raise ValueError("the checkpoint does not describe its model.")
        grid = values.get("grid")
        return cls(
            model=values["model"],
            grid=None if grid is None else (int(grid[0]), int(grid[1])),
            tokenizer=values.get("tokenizer"),
            training=values.get("training", {}),
            lora=values.get("lora"),
        )


def build_model(config: dict[str, Any]) -> GridModel:
    """The model that `GridModel.config()` describes, with new weights."""
    values = dict(config)
    kind, described = values.pop("kind", None), values.pop("backbone", {})
    unknown = values.keys() - FIELDS.get(kind, set())
    if kind not in FIELDS or unknown or (kind == "flashar" and "branch_layer" not in values):
        raise ValueError(
            f'model kind is {kind!r} with {", ".join(values) or "no fields"}; expected "raster", or "flashar" with '
            f"branch_layer and some of {', '.join(sorted(FIELDS['flashar']))}."
        )
    backbone = build_backbone(described)
    if kind == "raster":
        return RasterAR(backbone)
    values.pop("compatibility", None)  # named the conventions of a released model once
    if values.get("corner") == "released":
        return ReleasedFlashAR(backbone, values["branch_layer"], values["vertical_layers"])
    return FlashAR(backbone, **values)


def build_on_meta(config: dict[str, Any]) -> GridModel:
    """`build_model` without memory for weights."""
    with torch.device("meta"):
        return build_model(config)
