"""What somebody asks a checkpoint to draw, checked as a whole before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashar_pl.checkpoints.opening import Source, check_plan, check_top_k
from flashar_pl.decoding.prompts import Wanted, ask, check_seed, choose_grid
from flashar_pl.options import SampleOptions, SamplingSettings, ShapeOptions, TextOptions

if TYPE_CHECKING:
    from flashar_pl.decoding.samples import SampleSet


@dataclass(frozen=True)
class DrawRequest:
    """N samples of one model."""

    wanted: Wanted
    grid: tuple[int, int]
    plan: str
    sampling: SamplingSettings
    """With the guidance of the model where none was given."""
    seed: int
    """Sample i has seed + i."""

    @classmethod
    def of(
        cls,
        source: Source,
        draw: SampleOptions,
        sampling: SamplingSettings,
        shape: ShapeOptions,
        text: TextOptions,
        plan: str | None = None,
    ) -> DrawRequest:
        """What the options ask of a model; plan None = its own.

        Raises:
            ValueError: an option that does not fit the model, or another one.
        """
        sampling = sampling.of(source.model.backbone.published_cfg_scale)
        grid = choose_grid(source, shape)
        check_top_k(source.model, sampling.top_k)
        chosen = check_plan(source.model, plan, grid)
        wanted = ask(source, grid, draw.num_images, sampling.guided, draw, text)
        check_seed(draw.seed, len(wanted))
        return cls(wanted, grid, chosen, sampling, draw.seed)

    def notes(self, source: Source) -> list[str]:
        """What the user may not have meant."""
        backbone, trained, notes = source.model.backbone, source.description.grid, []
        if trained is not None and tuple(trained) != self.grid and not backbone.many_grids:
            sizes = f"{self.grid[0]}x{self.grid[1]} codes; the model was trained on {trained[0]}x{trained[1]}"
            notes.append(f"drawn on {sizes} and knows no other.")
        guided = backbone.guided(self.sampling)
        if self.sampling.cfg_interval is not None and not guided:
            notes.append("--cfg-interval does nothing without guidance; give --cfg-scale.")
        if self.wanted.prompts is not None and not all(text.strip() for text in self.wanted.prompts):
            notes.append("a prompt is empty; its images are drawn without a description.")
        return notes + backbone.notes(self.wanted.condition, guided)

    def samples(self, batch_size: int, every: int = 1) -> SampleSet:
        """The samples, `batch_size` computed together; `every` of each."""
        from flashar_pl.decoding.samples import SampleSet

        wanted = self.wanted
        return SampleSet(
            wanted.condition, self.grid, self.plan, self.sampling, batch_size, self.seed, wanted.unconditional, every
        )
