"""Settings of a training run. The text under a field is its help text on the command line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from flashar_pl.backbones import Backbone, describe_backbone, import_backbone, register_backbone
from flashar_pl.backbones.registry import DEFAULT, complete, family
from flashar_pl.checkpoints.hub import find_prompt_tokenizer
from flashar_pl.checkpoints.official import backbone_config
from flashar_pl.checkpoints.repositories import locate
from flashar_pl.models.dual_head import Fusion, Split
from flashar_pl.models.flashar import check_video
from flashar_pl.models.intra import check_groups
from flashar_pl.models.lora import LoraConfig
from flashar_pl.options import SamplingSettings
from flashar_pl.training.stages import ScheduleConfig

State = Literal["fp32", "bf16", "8bit"]

MOST_PICTURES, MOST_TOGETHER = 4096, 2**16
"""Pictures of one validation, and samples drawn together."""


@dataclass(frozen=True)
class BackboneConfig:
    """The raster model."""

    preset: str | None = None
    """Published size, such as llamagen-b or emu35-34b; None = options give every size."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backbone that differ from the preset, such as {dim: 64, n_layer: 4, n_head: 4}."""
    directory: str | None = None
    """Directory with released weights, or OWNER/NAME in the Hub cache, whose config.json gives the sizes; a preset
    beside it is taken where there is no such directory, as for a plan."""
    kind: str | None = None
    """Family of a model without preset and directory; None = llamagen. A class_path names a backbone of your own."""

    @classmethod
    def of(cls, backbone: BackboneConfig | Backbone) -> BackboneConfig:
        """The configuration of a backbone; the kind of one that a YAML names by class_path is registered."""
        if isinstance(backbone, BackboneConfig):
            return backbone
        register_backbone(type(backbone))
        options = backbone.config_dict()
        return cls(kind=options.pop("kind"), options=options)

    @classmethod
    def named(cls, class_path: str, init_args: dict[str, Any] | None = None) -> BackboneConfig:
        """The configuration of a backbone that the user names by its import path."""
        return cls(kind=import_backbone(class_path).kind, options=init_args or {})

    def resolve(self) -> dict[str, Any]:
        """The full configuration, what `build_backbone` takes, with the backbone's own defaults for training.

        Raises:
            ValueError: an unknown or missing option, an unknown preset, or a kind that preset or directory contradict.
        """
        try:
            return self._resolved()
        except ValueError as error:
            raise ValueError(f"model.backbone: {error}") from error

    def _resolved(self) -> dict[str, Any]:
        base: dict[str, Any] = {"kind": self.kind or DEFAULT}
        if (released := self._released_directory()) is not None:
            base = _released(released)
        elif self.preset is not None:
            base = complete({"preset": self.preset})
        if self.kind not in (None, base["kind"]):
            given = self.preset or self.directory
            raise ValueError(f"kind is {self.kind!r}, but {given} is of kind {base['kind']}; leave kind out.")
        base |= self.options
        usual = family(complete(base)["kind"]).training_options(base)
        return describe_backbone(base | usual | self.options).config_dict()

    def _released_directory(self) -> str | None:
        """Where `directory` is; None = the preset is to be taken. Raises ValueError as `locate` does."""
        if self.directory is None:
            return None
        try:
            found = locate(self.directory)
        except ValueError:
            if self.preset is None:
                raise
            return None
        return found if self.preset is None or Path(found, "config.json").is_file() else None


def _released(directory: str) -> dict[str, Any]:
    """Configuration of a directory of released weights; with the unconditional prompt if its tokens are there."""
    config = backbone_config(directory, "visual")
    if config["boi_token_id"] is None or config["null_token_id"] is not None:
        return config
    if (tokens := find_prompt_tokenizer(directory)) is not None:
        config["unconditional_prompt"] = tokens.unconditional("official").tolist()
    return config


@dataclass(frozen=True)
class IntraConfig:
    """Codes of a diagonal that see one another (docs/results/beyond.md)."""

    groups: int = 2
    """In how many groups the codes of a diagonal are drawn, each seeing those before: 2, 4, 8 and so on; 1 is off."""
    alone: bool = False
    """Freeze everything else: for a trained FlashAR model, given by model.init_from."""

    def __post_init__(self) -> None:
        try:
            check_groups(self.groups)
        except ValueError as error:
            raise ValueError(f"model.flashar.intra.{error}") from error


@dataclass(frozen=True)
class VideoConfig:
    """Frames one below the other in the grid, and a third branch, which predicts the next frame (docs/video.md)."""

    frames: int
    """T; the grid has T times the rows of a frame."""
    delay: int = 1
    """Steps between the same cells of two frames; above 1 where contents move to the left or upwards."""

    def __post_init__(self) -> None:
        try:
            check_video(self.frames, self.delay)
        except ValueError as error:
            raise ValueError(f"model.flashar.video: {error}") from error


@dataclass(frozen=True)
class FlashARConfig:
    """The vertical branch and the fusion of both predictions."""

    branch_layer: int
    """m, the layer at which the vertical branch forks off, 0 to the number of layers L; the paper uses L - 1."""
    vertical_layers: int | None = None
    """Number of cloned layers; None = L - m."""
    fusion: Fusion = "gate"
    """Learnt gate of states (Eq. 7); logit_gate, of normalised logits as in the authors' LlamaGen code; or a fixed
    weight of 0.5."""
    corner: Literal["horizontal", "fused"] = "horizontal"
    """What predicts cell (0, 0): the horizontal head (the paper), or both like any other cell (NAR)."""
    intra: IntraConfig | None = None
    """Draw the codes of a diagonal in groups that see one another; None = independently (the paper)."""
    video: VideoConfig | None = None
    """Decode a video along diagonals of all its frames; None = images."""

    def __post_init__(self) -> None:
        if self.intra is not None and self.video is not None:
            raise ValueError("model.flashar.intra and video are given; expected one: a step of a video is no line.")


@dataclass(frozen=True)
class PARConfig:
    """PAR instead of FlashAR (docs/baselines.md)."""

    tokens_per_step: int = 4
    """n, cells of one parallel step, a square number: 4 or 16 in the published models."""


@dataclass(frozen=True)
class BlockDiffusionConfig:
    """BlockDiffusion instead of FlashAR (docs/baselines.md)."""

    strategy: Literal["mdlm", "row", "sub4x4", "sub8x8"] = "mdlm"
    """What a block is: the whole grid, a row, or a square of 4 x 4 or 8 x 8."""
    clean_context: bool = False
    """Train with a clean copy of the codes and cache finished blocks; the authors do neither."""
    steps: int = 16
    """Calls of the model per block when samples are drawn."""


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW on float32 weights."""

    lr: float = 2e-5
    """Base learning rate; the schedule scales it per role."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    weight_decay: float = 0.05
    """Weight decay of matrices and embeddings; vectors have none."""
    decay_vectors: bool = False
    """Vectors too, as the authors' Emu3.5 code does."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    state: State = "fp32"
    """Moments: fp32 (8 bytes per parameter), bf16 (4, rounded at random), or 8bit (2, needs torchao)."""

    skip_not_finite: int = 0
    """How many steps with a loss or gradient that is not finite a run leaves out before the next one ends it."""

    def __post_init__(self) -> None:
        if self.skip_not_finite < 0:
            raise ValueError(f"optimiser.skip_not_finite is {self.skip_not_finite}; expected 0 or more steps.")
        if self.lr <= 0 or self.weight_decay < 0 or self.clip <= 0:
            raise ValueError(
                f"lr is {self.lr}, weight_decay {self.weight_decay}, clip {self.clip}; expected lr > 0, "
                "weight_decay >= 0, clip > 0."
            )


@dataclass(frozen=True)
class LossConfig:
    """What differs from L_fuse + aux_weight (L_H + L_V) (Sec. 4.3)."""

    horizontal: float | None = None
    """Weight of L_H; None = aux_weight. The authors' code has 0."""
    vertical: float | None = None
    """Weight of L_V; None = aux_weight."""
    gate_collapse: float = 0.0
    """Weight of 1 - mean H2(g), H2 the binary entropy in bits, over cells that both heads predict; it moves the gate
    only. The authors' ablations have 0.1."""
    distillation: float = 0.0
    """Weight, in stage 1, of the divergence of the vertical head from the raster model; a second forward, without
    gradients. The authors' Emu3.5 code has 0.2."""
    temperature: float = 2.0
    """T of the distillation."""
    split: float | None = None
    """lambda in lambda CE_H + (1 - lambda) CE_V, each over all targets of its head, in place of L_fuse; the gate learns
    nothing from it. The authors' LlamaGen code has 0.5 where it is on."""
    column0: float = 0.0
    """With split: weight of the vertical head's loss in column 0 below row 0, in addition."""

    def __post_init__(self) -> None:
        if (
            min(self.horizontal or 0, self.vertical or 0, self.gate_collapse, self.distillation, self.column0) < 0
            or self.temperature <= 0
            or not 0 <= (self.split or 0) <= 1
        ):
            raise ValueError(
                f"model.losses is {asdict(self)}; expected weights of 0 or more, temperature above 0, split 0 to 1."
            )
        if self.column0 and self.split is None:
            raise ValueError("model.losses.column0 is part of the split loss; set model.losses.split, such as 0.5.")
        if not self.distillation and self.temperature != 2.0:
            raise ValueError(
                "model.losses.temperature is the distillation's; set model.losses.distillation, such as 0.2."
            )

    def options(self, aux_weight: float, flashar: FlashARConfig | None) -> dict[str, Any]:
        """Arguments of `GridModel.loss`. ValueError for a weight that would do nothing."""
        if flashar is None and self != LossConfig():
            raise ValueError("model.losses is about both heads of FlashAR; give model.flashar, or leave it out.")
        if self.gate_collapse and flashar is not None and flashar.fusion == "average":
            raise ValueError("model.losses.gate_collapse needs a gate; expected flashar.fusion: gate or logit_gate.")
        pair = tuple(aux_weight if each is None else each for each in (self.horizontal, self.vertical))
        given: dict[str, Any] = {"aux_weight": aux_weight if pair == (aux_weight, aux_weight) else pair}
        if self.gate_collapse:
            given["gate_collapse"] = self.gate_collapse
        if self.distillation:
            given |= {"distillation": self.distillation, "temperature": self.temperature}
        if self.split is not None:
            given["split"] = Split(self.split, self.column0)
        return given


@dataclass(frozen=True)
class ValidationConfig(SamplingSettings):
    """What a validation does besides the likelihood of held-out images."""

    samples: int = 0
    """Images to generate for FID and Inception Score; 0 = none. Sample i has class i modulo the number of classes."""
    sample_batch: int = 64
    """Images generated at once on one device."""
    grid_images: int = 0
    """Images shown in every validation, below real ones and the names of classes or captions; 0 = no picture."""
    plan: Literal["raster", "diagonal"] | None = None
    """Decoding order of samples and likelihood; None = the model's own."""
    seed: int = 0
    """Sample i is drawn with seed + i, in every validation."""
    features: str | None = None
    """Feature extractor of the Fréchet distance: a classifier's directory, or the file of Inception weights."""
    reference: str | None = None
    """File (.npz) with the moments of real images; None = the images of the validated split."""
    fid_every: int = 1
    """Compute FID and Inception Score in every such validation of a fit."""
    at_start: bool = False
    """Also validate before the first step, as step 0: FlashAR is then the training-free model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0 or self.grid_images < 0 or self.sample_batch < 1 or self.fid_every < 1:
            raise ValueError(
                f"validation.samples is {self.samples}, grid_images {self.grid_images}, sample_batch "
                f"{self.sample_batch}, fid_every {self.fid_every}; expected at least 0, 0, 1, 1."
            )
        if self.grid_images > MOST_PICTURES or self.sample_batch > MOST_TOGETHER:
            raise ValueError(
                f"validation.grid_images is {self.grid_images}, sample_batch {self.sample_batch}; expected at most "
                f"{MOST_PICTURES:,} and {MOST_TOGETHER:,}, which are held in memory."
            )
        if self.samples == 1 or (self.samples and self.features is None):
            raise ValueError(
                f"validation.samples is {self.samples} and features {self.features!r}; a Fréchet distance needs two or "
                "more samples and a feature extractor. For pictures alone set grid_images."
            )
        if self.features is not None and not self.samples:
            raise ValueError(f"validation.features is {self.features!r}, but samples is 0; expected 2 or more.")

    @property
    def sampling(self) -> SamplingSettings:
        """How the samples are drawn."""
        return SamplingSettings(**{each.name: getattr(self, each.name) for each in fields(SamplingSettings)})


def model_config(
    backbone: BackboneConfig,
    flashar: FlashARConfig | None,
    par: PARConfig | None = None,
    block_diffusion: BlockDiffusionConfig | None = None,
) -> dict[str, Any]:
    """The argument of `flashar_pl.checkpoints.description.build_model`. ValueError for two methods at once."""
    described = backbone.resolve()
    given = {"flashar": flashar, "par": par, "block_diffusion": block_diffusion}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(f'model.{name}' for name in named)} are given; expected one method at most.")
    if par is not None:
        return {"kind": "par", "backbone": described, **asdict(par)}
    if block_diffusion is not None:
        return {"kind": "block_diffusion", "backbone": described, **asdict(block_diffusion)}
    if flashar is None:
        return {"kind": "raster", "backbone": described}
    n_layer = describe_backbone(described).n_layer
    if not 0 <= flashar.branch_layer <= n_layer:
        raise ValueError(
            f"flashar.branch_layer is {flashar.branch_layer}; expected 0 to {n_layer} (the number of layers)."
        )
    options = {name: value for name, value in asdict(flashar).items() if name not in ("intra", "video") or value}
    return {"kind": "flashar", "backbone": described, **options}


OPTIMISER, SCHEDULE, VALIDATION, LOSS_OPTIONS = OptimiserConfig(), ScheduleConfig(), ValidationConfig(), LossConfig()
"""Defaults of `FlashARModule`."""
TYPES: dict[str, Any] = {
    "backbone": BackboneConfig,
    "flashar": FlashARConfig,
    "par": PARConfig,
    "block_diffusion": BlockDiffusionConfig,
    "lora": LoraConfig,
    "optimiser": OptimiserConfig,
    "schedule": ScheduleConfig,
    "validation": ValidationConfig,
    "losses": LossConfig,
}


def plain_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as dictionaries, lists, numbers and text: what a checkpoint or a YAML can hold."""
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in arguments.items()}  # type: ignore[arg-type]
    return dict(json.loads(json.dumps(plain)))


def check_finite(settings: Any, name: str = "model") -> None:
    """ValueError for a number in plain settings that is infinite or none: comparisons let NaN pass."""
    if isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{name} is {settings}; expected a finite number.")
    if isinstance(settings, dict | list):
        for key, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
            check_finite(value, f"{name}.{key}")


def typed_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `plain_settings`."""
    plain = plain | {"optimiser": plain["optimiser"] | {"betas": tuple(plain["optimiser"]["betas"])}}
    return {
        name: TYPES[name](**value) if name in TYPES and value is not None else value for name, value in plain.items()
    }
