"""Options shared by commands and by Python callers, each declared once; the text under a field is its `--help`.

A command takes these groups as parameters and `flashar_pl.commands.arguments` flattens them into options. Standard
library only: every `--help` imports this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, Self, get_args

Plan = Literal["raster", "diagonal", "lossless", "limited"]
Coupling = Literal["independent", "systematic"]
Drafter = Literal["above", "vertical"]
Weights = Literal["auto", "raw", "ema"]
Dtype = Literal["fp32", "bf16", "fp16"]
PixelDtype = Literal["fp32", "bf16"]
Runner = Literal["auto", "eager", "compiled", "graphs", "compiled-graphs", "fused"]
WeightFormat = Literal["auto", "plain", "packed", "int8", "fp8"]
Split = Literal["train", "validation", "test"]
MOST_CODES = 2**16
"""Largest grid that is taken for meant: 256 x 256 codes are 4,096 x 4,096 pixels."""


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where checkpoints come from"""

    download: bool = False
    """Fetch a checkpoint OWNER/NAME of huggingface.co where its local cache lacks it."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions(HubOptions):
    """Architecture"""

    branch_layer: int | None = None
    """Turns a raster model into an untrained FlashAR that branches at this layer."""
    grid: str | None = None
    """Code grid HEIGHTxWIDTH, where the model does not say it (official files, presets) or another one is wanted."""
    backbone_class: str | None = None
    """Import path of a backbone of your own, such as mine.models.Backbone; a checkpoint never says what to import."""


@dataclass(frozen=True)
class ModelOptions(ArchitectureOptions):
    """Model"""

    checkpoint: str
    """Lightning checkpoint, converted directory, official .pt or .safetensors file, released directory, or OWNER/NAME
    in the cache of huggingface.co."""
    weights: Weights = "auto"
    """Which weights of a file that may have two: averaged ones where present (auto), raw, or ema."""
    n_head: int | None = None
    """Attention heads, for official files of unpublished sizes."""
    tokenizer: str | None = None
    """What decodes the codes, where the checkpoint does not say it: a directory, vq16:FILE, vq8:FILE, ibq:FILE,
    multi_scale_vq:FILE, pixels:LEVELS, or a JSON object."""
    groups: int | None = None
    """In how many groups the codes of a diagonal are drawn, for models trained with model.flashar.intra: 1 (all at
    once, plain FlashAR), 2, 4 and so on to 64 (one by one). Default: the checkpoint's own."""


@dataclass(frozen=True)
class PresetOptions(ArchitectureOptions):
    """Model"""

    preset: str | None = None
    """Published size with random weights, such as llamagen-l, emu35-34b or var-d16; a wrong name lists them all."""
    checkpoint: str | None = None
    """A checkpoint of any kind instead of a preset."""


MOST = 1000
"""Largest guidance and temperature; those of published models are below 20."""


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn

    Invalid values raise ValueError on construction.
    """

    cfg_scale: float | None = None
    """Classifier-free guidance s in u + s (c - u); 1 is off (one pass), 0 unconditional. Default: what the published
    weights of the model's family need (5 for Emu3.5), else 1."""
    cfg_interval: int | None = None
    """k: guide only steps with at most k + 1 cells decoded before them. Default: every step."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely code."""
    top_k: int = 0
    """Keep the k most likely codes, ties included; 0 is off."""
    top_p: float = 1.0
    """Keep the most likely codes up to this probability; 1 is off."""
    greedy: bool = False
    """Take the most likely code after guidance instead of drawing."""
    coupling: Coupling = "independent"
    """systematic: the codes of a diagonal leave their most likely values as seldom together as each one's distribution
    allows; independent: each by itself."""

    def __post_init__(self) -> None:
        check_least(self, cfg_scale=0, cfg_interval=0, temperature=0, top_k=0)
        for name in ("cfg_scale", "temperature"):
            if (value := getattr(self, name) or 0) > MOST:  # far beyond it float32 logits are infinite, or NaN
                raise ValueError(f"{name} is {str(value)[:40]}; expected at most {MOST:,}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1 = off).")
        if self.coupling not in get_args(Coupling):
            raise ValueError(f"coupling is {self.coupling!r}; expected one of {', '.join(get_args(Coupling))}.")
        if self.coupling != "independent" and self.greedy:
            raise ValueError(f"coupling is {self.coupling}, and greedy draws nothing; leave one of both out.")

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional row is needed at all."""
        return self.scale != 1.0

    @property
    def scale(self) -> float:
        """Guidance as a number."""
        return 1.0 if self.cfg_scale is None else self.cfg_scale

    def of(self, usual: float | None) -> Self:
        """The same settings with the guidance of a model in place of None; usual: None = it does without."""
        return replace(self, cfg_scale=usual or 1.0) if self.cfg_scale is None else self

    def guides(self, decoded: int) -> bool:
        """Whether a step with `decoded` cells before it is guided."""
        return self.guided and (self.cfg_interval is None or decoded <= self.cfg_interval + 1)


@dataclass(frozen=True)
class PlaceOptions:
    """Where it is computed"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps (Apple); auto is the GPU of CUDA where there is one, else the CPU."""


@dataclass(frozen=True)
class ComputeOptions(PlaceOptions):
    """What computes"""

    dtype: Dtype | None = None
    """Of weights and activations; softmax and sampling stay in float32 and float64. Default: fp32, for directories of
    released weights that of the files."""


@dataclass(frozen=True)
class DeviceOptions(ComputeOptions):
    """What computes"""

    batch_size: int | Literal["auto"] | None = None
    """Images computed together; a last partial batch is padded. auto is the largest that fits, up to 64 on a CPU and
    1024 on a GPU. Default: 16 for drawing, or fewer where fewer fit (evaluate 32, GenEval 4); 64 for scoring, where
    auto is the same."""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1)


@dataclass(frozen=True)
class PlanOptions(DeviceOptions):
    """What computes, in which order"""

    plan: Plan | None = None
    """Decoding order: raster (H*W steps), diagonal (H+W-1 steps), lossless, the raster plan's very codes in fewer
    forwards, or limited, diagonals that see and predict as far as they can what the raster order does: best without
    training. Default: the checkpoint's own."""


@dataclass(frozen=True)
class RunnerOptions:
    """What runs the decoder"""

    runner: Runner = "auto"
    """eager, compiled (torch.compile of the blocks), graphs (CUDA graphs), compiled-graphs, or fused (own kernels in
    Triton, in graphs); auto is graphs on a GPU, eager on a CPU. All draw the same codes up to rounding."""


@dataclass(frozen=True)
class CodeOptions(RunnerOptions, PlanOptions):
    """What drives decoding"""

    weight_format: WeightFormat = "auto"
    """plain, packed (laid out for a CPU's matrix products), int8 or fp8 (one byte a weight, rounded; activations, too,
    where the device multiplies bytes); auto is packed or plain on a CPU, whichever measured faster for such a model,
    and plain on a GPU."""
    drafter: Drafter | None = None
    """With --plan lossless, what guesses the codes that are verified: the code above, or the vertical branch. The
    images are the same. Default: above."""
    window_rows: int | None = None
    """With --plan lossless, rows of the grid that one forward verifies. Default: 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, window_rows=1)

    def speculation(self, plan: str) -> tuple[Drafter, int]:
        """Drafter and rows of the window. ValueError where they are given and the plan does not speculate."""
        if plan != "lossless" and (self.drafter, self.window_rows) != (None, None):
            raise ValueError(f"--drafter and --window-rows are for --plan lossless, and the plan is {plan}.")
        return self.drafter or "above", self.window_rows or 2


@dataclass(frozen=True)
class PixelOptions:
    """What turns codes into pixels"""

    pixel_dtype: PixelDtype | None = None
    """What the image tokenizer decodes in; it encodes in float32. Default: bf16 on a GPU that has it (compute
    capability 8.0), else what the tokenizer's config says, or fp32."""


@dataclass(frozen=True)
class EngineOptions(PixelOptions, CodeOptions):
    """What drives decoding"""


@dataclass(frozen=True)
class WayOptions:
    """Ways of decoding"""

    runners: str = "auto"
    """As --runner elsewhere: eager, compiled, graphs, compiled-graphs or fused, here several separated by commas."""
    weight_formats: str = "auto"
    """As --weight-format elsewhere: plain, packed, int8 or fp8, here several separated by commas."""

    def each(self) -> list[tuple[Runner, WeightFormat]]:
        """Every combination. Raises ValueError for an unknown name."""
        runners = split_names("runners", self.runners, get_args(Runner))
        formats = split_names("weight_formats", self.weight_formats, get_args(WeightFormat))
        return [(runner, weights) for weights in formats for runner in runners]


@dataclass(frozen=True)
class RankOptions:
    """Devices that share the work"""

    devices: int | None = None
    """Processes of each machine, one for each GPU. Default: every visible GPU, or one process on the CPU. Under
    torchrun or SLURM: those it started."""
    num_nodes: int = 1
    """Machines that run this same command, told apart by MASTER_ADDR, MASTER_PORT and NODE_RANK, on one shared file
    system. Under torchrun or SLURM it is known."""


@dataclass(frozen=True)
class SharingOptions:
    """Devices that share one model"""

    tensor_parallel: int = 1
    """Devices, each a process that holds a part of every layer's heads and width and of the vocabulary, for models that
    one device does not hold, or for speed. All draw the same images together, those of one device up to rounding."""

    def __post_init__(self) -> None:
        check_least(self, tensor_parallel=1)


@dataclass(frozen=True)
class CodecOptions(PlaceOptions):
    """Tokenizer"""

    tokenizer: str | None = None
    """vq16, vq8 or ibq, or KIND:FILE, or pixels:LEVELS: grey levels as codes, for tiny images. Default: vq16, for
    captioned images ibq."""
    weights: str | None = None
    """Weights file, or directory, of the tokenizer."""
    batch_size: int | None = None
    """Images of one pass through the tokenizer, each crop counted. Default: 32, for captioned images 8."""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1)


@dataclass(frozen=True)
class ShardPlaceOptions:
    """Shards"""

    out: str
    """Directory of the shards, made if needed."""
    block: int = 100
    """Images of a record, the unit training shuffles."""
    shard_images: int = 2000
    """Images of a shard (one for each grid); a killed run loses at most the shard each device was at."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", str(Path(self.out).expanduser()))
        check_least(self, block=1, shard_images=1)


@dataclass(frozen=True)
class SplitOptions(ShardPlaceOptions):
    """Shards"""

    split: Split = "train"
    """Which split to write; a run with the same --out adds another one."""


@dataclass(frozen=True)
class PackOptions(ShardPlaceOptions):
    """Shards"""

    workers: int = 4
    """Processes that read and decode, for each device."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """What becomes of images, ready codes, labels and captions that cannot be used: left out, counted and named
    (skip), or the first one ends the run (stop)."""
    max_bad_share: float = 0.01
    """With skip, abort if it is a larger share of the samples."""
    keep_order: bool = False
    """Keep the order of the images, if they are shuffled already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, workers=0)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; expected a share from 0 to 1.")


@dataclass(frozen=True)
class ShardOptions(PackOptions, SplitOptions):
    """Shards"""


@dataclass(frozen=True)
class AssetOptions:
    """Text tokens"""

    assets: str | None = None
    """Directory with the text tokens of a model that takes prompts, such as emu3.tiktoken. Default: the checkpoint's
    own, or the one it was trained with."""


@dataclass(frozen=True)
class TextOptions(AssetOptions):
    """How prompts become conditions"""

    text_encoder: str | None = None
    """Directory of the text encoder (google/flan-t5-xl) of a model that takes text features."""
    negative_prompt: str | None = None
    """What guidance leads away from. Default: the unconditional prompt the model knows."""


@dataclass(frozen=True)
class ShapeOptions:
    """Shape of the images"""

    aspect_ratio: str | None = None
    """Width to height: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16, 2:1, 1:2 or 21:9; or a grid HEIGHTxWIDTH in codes."""
    image_size: int | None = None
    """Side in pixels of the square with the area of the images. Default: what is usual for a model that knows every
    size (Emu3.5: 512), 512 with a named aspect ratio, otherwise the checkpoint's own grid."""


@dataclass(frozen=True)
class Subject:
    """What to draw"""

    prompt: list[str] | None = None
    """Text to draw, with a model conditioned on text; may be given several times."""
    prompts: str | None = None
    """File with one prompt a line, such as experiments/paper/appendix_a_prompts.txt."""
    classes: str | list[int] | None = None
    """Classes of a class-conditional model: ids such as 3,7 or 0-9, the names that its training data had, or a file
    such as experiments/paper/figure6_classes.txt with one a line."""
    text_features: str | None = None
    """Text features of a text-conditional model: .npy (N, T, C) or (T, C), or .npz or .safetensors with "features" and,
    where captions are left-padded, "mask" (N, T)."""


@dataclass(frozen=True)
class SampleOptions(Subject):
    """What to draw"""

    num_images: int = 4
    """Images of each prompt, class or caption."""
    seed: int = 0
    """Of the first sample; sample i uses seed + i."""

    def __post_init__(self) -> None:
        check_least(self, num_images=1)


def check_least(group: Any, **least: float) -> None:
    """ValueError where an option of a group is a number below the least that is told for it."""
    for name, low in least.items():
        value = getattr(group, name)
        if isinstance(value, int | float) and not low <= value < inf:
            raise ValueError(f"{name} is {value}; expected {low} or more.")


def as_settings(*groups: Any) -> dict[str, Any]:
    """All options of some groups as plain values, for the record of a result."""
    return {name: value for group in groups for name, value in asdict(group).items()}


# --- values written as text ------------------------------------------------------------------------------------------


def split_names(option: str, text: str, known: Iterable[str]) -> list[Any]:
    """ "a,b" as a list of names without repeats. Raises ValueError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} has {unknown[0]!r}; expected some of {', '.join(known)}.")
    return names


def parse_grid(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """ "16x24" or "16" (a square) as (H, W). Raises ValueError for anything else."""
    if text is None or isinstance(text, tuple):
        return text
    sides = str(text).lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"grid is {text!r}; expected HEIGHTxWIDTH such as 16x16, or one side of a square.")
    height, width = int(sides[0]), int(sides[-1])
    if height * width > MOST_CODES:
        raise ValueError(
            f"grid is {text!r}, {height * width:,} codes; expected at most {MOST_CODES:,}, in codes, not pixels."
        )
    return height, width


def parse_tokenizer(text: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """ "pixels:17", "vq16:FILE", "ibq:FILE", a directory or a JSON object, as the argument of `build_tokenizer`."""
    if text is None or isinstance(text, dict):
        return text
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--tokenizer {text!r} is not JSON: {error}") from error
    if Path(text).expanduser().is_dir():
        return {"kind": "ibq", "weights": text}
    kind, _, value = text.partition(":")
    if not value:
        raise ValueError(f"tokenizer is {text!r}; expected KIND:VALUE such as vq16:vq_ds16_c2i.pt or pixels:17.")
    if kind == "pixels":
        if not value.isdigit():
            raise ValueError(f"tokenizer is {text!r}; expected pixels:LEVELS such as pixels:17.")
        return {"kind": kind, "levels": int(value)}
    return {"kind": kind, "weights": value}


MOST_CLASSES = 100_000
"""Of one range."""


def parse_classes(classes: str | Sequence[int] | int, option: str = "classes") -> list[int]:
    """ "3,7", "0-9" or a list of ints as class ids, or as the numbers of another option. Raises ValueError for anything
    else."""
    if not isinstance(classes, str):
        given = [classes] if isinstance(classes, int) else [int(c) for c in classes]
        if wrong := [number for number in given if abs(number) >= 2**63]:
            raise ValueError(f"{option} has a number of {wrong[0].bit_length()} bits; expected at most 63.")
        return given
    ids: list[int] = []
    for part in classes.strip("[] ").split(","):
        first, dash, last = part.strip().partition("-")
        known = first.isdecimal() and len(first) <= 18 >= len(last)  # 18 digits fit into 63 bits
        if not known or (dash and not (last.isdecimal() and 0 <= int(last) - int(first) < MOST_CLASSES)):
            raise ValueError(f"{option} is {classes[:80]!r}; expected numbers such as 3,7 or a range such as 0-9.")
        ids += range(int(first), int(last or first) + 1)
    return ids
