"""What is measured or checked: a checkpoint, or random weights of a published size.

Shapes: B images, H x W grid.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from flashar_pl.backbones import Prompts
from flashar_pl.backbones.condition import Condition
from flashar_pl.checkpoints.description import build_on_meta
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.models import GridModel
from flashar_pl.options import ArchitectureOptions, DeviceOptions, Dtype, ModelOptions, PresetOptions, parse_grid
from flashar_pl.planner.sizes import ModelSizes, model_sizes, named_sizes


@dataclass
class Subject:
    """A model, and the grid that it draws."""

    sizes: ModelSizes
    grid: tuple[int, int]
    loaded: GridModel | None = None
    """Of a checkpoint, in inference; None = random weights, still to be made."""

    @classmethod
    def of(
        cls, options: PresetOptions, device: torch.device, dtype: Dtype = "fp32", layers: int | None = None
    ) -> Subject:
        """What the options name; layers: of a preset, None = all. Raises ValueError unless they name one model."""
        branch, own = options.branch_layer, options.backbone_class
        given = (options.checkpoint, options.preset)
        if None not in given or (*given, own) == (None, None, None):
            raise ValueError("give either --preset NAME (random weights; a wrong one lists them) or --checkpoint PATH.")
        if options.checkpoint is not None:
            asked = ModelOptions(
                options.checkpoint, **{each.name: getattr(options, each.name) for each in fields(ArchitectureOptions)}
            )
            source = open_checkpoint(asked, DeviceOptions(str(device), dtype))
            return cls(model_sizes(source.model.config()), source.need_grid(), source.model)
        sizes = named_sizes(options.preset, own, branch, **({} if layers is None else {"n_layer": layers}))
        return cls(sizes, parse_grid(options.grid) or sizes.backbone.usual_grid)

    def model(self, device: torch.device, dtype: torch.dtype) -> GridModel:
        """The checkpoint's, or one with random weights, made on the device and in the dtype it is used in."""
        if self.loaded is not None:
            self.loaded.invent()
            return self.loaded
        model = build_on_meta(self.sizes.config).to(dtype).to_empty(device=device)
        with torch.no_grad():
            for parameter in (*model.parameters(), *model.buffers()):
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
        model.invent()
        return model.eval().requires_grad_(False)

    def condition(self, batch: int, guided: bool) -> tuple[Condition, Condition | None]:
        """Conditions of `batch` images, and what guidance needs besides."""
        condition = self.sizes.backbone.conditioning.example(batch)
        if guided and isinstance(condition, Prompts):
            return condition, Prompts(row[:16] for row in condition)  # published empty prompts are this short
        return condition, None
