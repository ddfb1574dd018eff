"""`flashar plan`: memory, time and decoding floor of a training run, by arithmetic.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.console import table
from flashar_pl.files import require_new, write_json
from flashar_pl.options import ArchitectureOptions, parse_grid

if TYPE_CHECKING:
    from flashar_pl.planner.sizes import ModelSizes
    from flashar_pl.planner.training import TrainingSetup

IMAGENET = 1_281_167
"""Training images of ImageNet, for epochs of shards that are not there yet."""
BATCH = 64
"""`CodesDataModule`'s global batch where a file gives none."""


Switch = Literal["on", "off"]


@dataclass(frozen=True)
class RunOptions(ArchitectureOptions):
    """Run"""

    config: str | None = None
    """YAML of a training run."""
    preset: str | None = None
    """A published size as FlashAR instead of a file, such as llamagen-b; a wrong name lists them."""
    strategy: Literal["fsdp", "ddp"] | None = None
    """fsdp (sharded) or ddp (everything on every GPU, also for one GPU). Default: the file's."""
    samples: int | None = None
    """Samples of one forward on one GPU; with more or fewer forwards per step the batch of a step stays what the file
    says, or grows to whole forwards. Default: the file's batch size over the GPUs; 1 for a preset."""
    replicas: int | None = None
    """Copies of the shards, for hybrid sharding over several nodes. Default: the file's, or 1."""
    moments: Literal["fp32", "bf16", "8bit"] | None = None
    """Optimizer state. Default: the file's, or fp32."""
    offload: Switch | None = None
    """Whether shards, gradients and optimizer state stay in CPU memory. Default: the file's, or off."""
    checkpointing: Switch | None = None
    """Whether blocks are run again in the backward pass. Default: the file's; on for a preset."""
    prefix: int | None = None
    """Prefix positions. Default: usual for the backbone's condition."""
    steps: int | None = None
    """Optimizer steps of the run. Default: the file's, or 50,000."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.preset is None and self.backbone_class is None):
            raise ValueError("give either --config experiments/NAME.yaml, or --preset NAME or --backbone-class PATH.")
        if self.prefix is not None and self.prefix < 0:
            raise ValueError(f"prefix is {self.prefix}; expected 0 or more positions.")

    def setup(self, gpus: int) -> dict[str, Any]:
        """What was typed, as fields of `TrainingSetup`."""
        given = {
            "gpus": gpus,
            "samples": self.samples,
            "sharded": None if self.strategy is None else self.strategy == "fsdp",
            "replicas": self.replicas,
            "moments": self.moments,
            "offload": None if self.offload is None else self.offload == "on",
            "checkpointing": None if self.checkpointing is None else self.checkpointing == "on",
            "grid": parse_grid(self.grid),
            "prefix": self.prefix,
            "total_steps": self.steps,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class HardwareOptions:
    """Hardware"""

    gpus: int = 8
    """GPUs of all nodes together."""
    gpu: Literal["h20", "h100", "h200", "a100"] = "h20"
    """Whose published FLOP and memory rates are used."""
    gpu_memory: float | None = None
    """GB of one GPU. Default: that of --gpu."""
    mfu: float = 0.4
    """Share of the published FLOP rate that training reaches."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or (self.gpu_memory is not None and self.gpu_memory <= 0):
            size = "" if self.gpu_memory is None else f" and gpu_memory {self.gpu_memory:g}"
            raise ValueError(f"gpus is {self.gpus}{size}; expected 1 or more GPUs with more than 0 GB.")


def plan(
    options: RunOptions, hardware: HardwareOptions = HardwareOptions(), *, out: str | None = None
) -> dict[str, Any]:
    """Say what a training run needs before it is started: parameters, bytes per GPU, hours, and the decoding floor.

    Everything is arithmetic on the configuration; no weights, data or GPU are needed. Options given here win over the
    file. Communication is not in the time: it is hidden or part of the stated MFU. GB are 10^9 bytes.

    Example:
        flashar plan --config experiments/llamagen_l_256.yaml --gpus 8 --gpu-memory 96

    Args:
        out: also write the numbers to this new JSON file.
    """
    from flashar_pl.planner.advice import GPUS, gpus_that_fit, what_would_fit
    from flashar_pl.planner.training import added, host_bytes, training_memory, training_time, usable

    if out is not None:
        require_new(out, "plan")
    gpus, config, mfu = hardware.gpus, options.config, hardware.mfu
    run = read_run(config, gpus) if config is not None else preset_run(options, gpus)
    sizes = run.sizes
    given = options.setup(gpus)
    if options.samples is not None and config is not None:
        given["accumulate"] = max(1, -(-run.setup.samples * run.setup.accumulate // max(1, options.samples)))
    setup = replace(run.setup, **given)
    rates = GPUS[hardware.gpu]
    memory = int(1e9 * (hardware.gpu_memory or rates.memory))
    stages = (1, 2) if sizes.flashar and setup.stage1_share > 0 else (2,)
    totals = {stage: training_memory(sizes, setup, stage) for stage in stages}
    peak, room = max(each.total for each in totals.values()), usable(memory)
    result: dict[str, Any] = {
        "config": config or options.preset or options.backbone_class,
        "setup": asdict(setup),
        "notes": run.notes,
        "parameters": sizes.parameters() | ({} if setup.lora is None else {"lora": added(sizes, setup.lora)}),
        "memory": {f"stage{stage}": {**asdict(each), "total": each.total} for stage, each in totals.items()},
        "host_bytes_per_process": host_bytes(sizes, setup),
        "gpu": {
            "name": hardware.gpu,
            "memory": memory,
            "usable": room,
            "flops": rates.flops,
            "bandwidth": rates.bandwidth,
        },
        "fits": peak <= room,
        "changes": [] if peak <= room else what_would_fit(sizes, setup, room),
        "gpus_that_fit": None if peak <= room else gpus_that_fit(sizes, setup, room),
        "mfu": mfu,
        "time": training_time(sizes, setup, rates.flops, mfu),
        "decode": decode_floors(sizes, setup.grid, setup.prefix, rates.bandwidth, rates.flops),
    }
    print(report(result))
    if out is not None:
        write_json(out, result)
    return result


@dataclass
class Run:
    """What a file or a preset says."""

    sizes: ModelSizes
    setup: TrainingSetup
    notes: list[str]
    """What was assumed."""


def preset_run(options: RunOptions, gpus: int) -> Run:
    """A published size, or a backbone of the user's with its default sizes, as FlashAR at its usual branch layer unless
    told; one sample per GPU, sharded, checkpointed."""
    from flashar_pl.backbones import import_backbone
    from flashar_pl.planner import model_sizes
    from flashar_pl.planner.training import TrainingSetup

    own = None if options.backbone_class is None else import_backbone(options.backbone_class)
    backbone = {"preset": options.preset} if own is None or options.preset is not None else {"kind": own.kind}
    sizes = model_sizes({"kind": "flashar", "backbone": backbone, "branch_layer": options.branch_layer})
    return Run(sizes, TrainingSetup(grid=sizes.usual_grid, gpus=gpus), [_assumed(sizes.usual_grid)])


def read_run(path: str, gpus: int) -> Run:
    """Model and setup from a training YAML.

    Raises:
        ValueError: no such file, not a training configuration, or a batch that the GPUs cannot share.
    """
    import yaml

    from flashar_pl.planner import model_sizes
    from flashar_pl.planner.training import TrainingSetup
    from flashar_pl.training.config import BackboneConfig, typed_settings
    from flashar_pl.training.lightning_cli import parsed_config
    from flashar_pl.training.module import FlashARModule

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no configuration {file}; expected a YAML such as those of experiments/.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict) or "backbone" not in values["model"]:
        raise ValueError(f"{file} has no model.backbone; expected the configuration of `flashar fit`.")
    given = values.get("data") or {}
    given = (given.get("init_args") or {}) if isinstance(given, dict) and "class_path" in given else given
    lacks_shards = isinstance(given, dict) and "shards" not in given  # a fit needs them, a plan does not
    values = parsed_config(["--config", path, *(["--data.shards", ""] if lacks_shards else [])])
    model, data, trainer = values["model"], values["data"], values["trainer"]
    data = data["init_args"] if "class_path" in data else data
    if "class_path" in model["backbone"]:
        model["backbone"] = asdict(BackboneConfig.named(**model["backbone"]))
    module = FlashARModule(**typed_settings(model))
    sizes = model_sizes(module.model_config)
    notes: list[str] = []
    grid = _grid(sizes, data.get("shards"), notes)
    batch = data.get("batch_size", BATCH)
    if batch < 1:
        raise ValueError(f"data.batch_size is {batch}; expected 1 or more.")
    if "batch_size" not in given:
        notes.append(f"data.batch_size {batch} assumed, the default")
    if batch % gpus:
        raise ValueError(f"data.batch_size {batch} is not a multiple of {gpus} GPUs; choose --gpus or --samples.")
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    schedule, settings = model.get("schedule") or {}, strategy_values(trainer)
    share = schedule.get("stage1_share")
    setup = TrainingSetup(
        grid=grid,
        plan="diagonal" if sizes.flashar else "raster",
        gpus=gpus,
        samples=batch // gpus,
        accumulate=accumulate,
        ema=bool(model.get("ema_decay")),
        lora=module.lora,
        total_steps=_steps(trainer, data, batch * accumulate, notes),
        stage1_share=(0.2 if sizes.flashar else 0.0) if share is None else float(share),
        moments=(model.get("optimiser") or {}).get("state", "fp32"),
        **settings,
    )
    return Run(sizes, setup, notes)


def strategy_values(trainer: dict[str, Any]) -> dict[str, Any]:
    """Sharding, replicas, compute dtype, checkpointing and offloading from the trainer section."""
    strategy = trainer.get("strategy") or "auto"
    if isinstance(strategy, dict) and "shard" in str(strategy.get("class_path", "")).lower():
        options = strategy.get("init_args") or {}
        return {
            "sharded": True,
            "replicas": int(options.get("replicas", 1)),
            "mixed": options.get("compute", "bf16") == "bf16",
            "checkpointing": bool(options.get("recompute", False)),
            "offload": bool(options.get("offload", False)),
        }
    mixed = "bf16" in str(trainer.get("precision", "32-true"))
    return {"sharded": False, "mixed": mixed, "checkpointing": False, "offload": False}


def _grid(sizes: ModelSizes, shards: Any, notes: list[str]) -> tuple[int, int]:
    """The grid of the shards: from their manifest, from a name such as imagenet_256, or the family's usual one."""
    import json

    place = Path(str(shards))
    manifests = [place / "manifest.json", *sorted(place.glob("*/manifest.json"))] if shards else []
    grids = [json.loads(path.read_text(encoding="utf-8"))["grid"] for path in manifests if path.is_file()]
    if grids:
        height, width = max(grids, key=lambda grid: grid[0] * grid[1])
        if len(grids) > 1:
            notes.append(f"grid {height}x{width} is the largest of {len(grids)} in {shards}")
        return int(height), int(width)
    if shards and (found := re.search(r"_(\d{2,4})$", str(shards).rstrip("/"))):
        side = int(found[1]) // 16
        notes.append(f"grid {side}x{side} guessed from the name {shards} ({found[1]} pixels, 16 per code)")
        return side, side
    notes.append(_assumed(sizes.usual_grid))
    return sizes.usual_grid


def _assumed(grid: tuple[int, int]) -> str:
    return f"grid {grid[0]}x{grid[1]} assumed; give --grid for another one"


def _steps(trainer: dict[str, Any], data: dict[str, Any], batch: int, notes: list[str]) -> int:
    """Optimizer steps: max_steps, or epochs over the shards."""
    if int(trainer.get("max_steps") or -1) > 0:
        return int(trainer["max_steps"])
    if trainer.get("max_epochs"):
        notes.append(f"epochs counted with {IMAGENET:,} images (ImageNet)")
        return int(trainer["max_epochs"]) * (IMAGENET // batch)
    notes.append("50,000 steps assumed; give --steps for another number")
    return 50_000


def decode_floors(
    sizes: ModelSizes, grid: tuple[int, int], prefix: int | None, bandwidth: float, rate: float
) -> list[dict[str, Any]]:
    """Bytes, FLOPs and lower bounds of decoding one guided image in bfloat16, for every plan the model can run."""
    from flashar_pl.planner import decode_job, decode_memory

    found = []
    for name in ("raster", "diagonal") if sizes.flashar else ("raster",):
        job = decode_job(sizes, name, grid, prefix=prefix)
        found.append(
            {
                "plan": name,
                "steps": job.plan.n_steps,
                "bytes": job.bytes,
                "flops": job.flops,
                "floor_s": job.floor(bandwidth, rate),
                "memory": decode_memory(sizes, name, grid, prefix=prefix).total,
            }
        )
    return found


def report(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    setup, gpu, time = result["setup"], result["gpu"], result["time"]
    roles = [[role, f"{count:,}"] for role, count in result["parameters"].items() if count]
    if setup["lora"] is not None:
        frozen = result["parameters"]["backbone"]
        roles.append(["trained", f"{sum(result['parameters'].values()) - frozen:,}"])
    roles.append(["total", f"{sum(result['parameters'].values()):,}"])
    stages = list(result["memory"])
    names = list(result["memory"][stages[0]])
    lines = [[name, *(f"{result['memory'][stage][name] / 1e9:.2f}" for stage in stages)] for name in names]
    kind = "FSDP2" if setup["sharded"] else "DDP" if setup["gpus"] > 1 else "one GPU"
    name = {"fp32": "float32", "bf16": "bfloat16", "8bit": "8-bit"}[setup["moments"]]
    state = f"{name} moments" + (" and shards in CPU memory" if setup["offload"] else "")
    if setup["lora"] is not None:
        base = {"fp32": "float32", "bf16": "bfloat16"}[setup["lora"]["base"]]
        state += f", frozen {base} backbone with LoRA of rank {setup['lora']['rank']}"
    text = [
        f"{result['config']}: {setup['gpus']} GPU(s), {kind}, {setup['samples']} sample(s) per GPU and forward, "
        f"{setup['accumulate']} forward(s) per step, "
        f"{state}, {'with' if setup['checkpointing'] else 'without'} activation checkpointing, "
        f"grid {setup['grid'][0]}x{setup['grid'][1]}",
        *(f"note: {note}" for note in result["notes"]),
        table(("parameters", "number"), roles),
        table(("GB per GPU", *stages), lines),
        _verdict(result),
        f"FLOPs per GPU and step: {', '.join(f'{stage} {count / 1e12:.1f} TF' for stage, count in time['step_flops_per_gpu'].items())}; "  # noqa: E501
        f"{setup['total_steps']:,} steps take {time['hours']:.1f} h, {time['gpu_hours']:.0f} GPU-hours, at "
        f"{result['mfu']:.0%} of {gpu['flops'] / 1e12:.0f} TFLOP/s ({gpu['name']})",
        "decoding one guided image in bfloat16:\n\n"
        + table(
            ("plan", "steps", "GB moved", "TFLOP", f"floor ms ({gpu['name']})", "GB needed"),
            [
                [
                    each["plan"],
                    str(each["steps"]),
                    f"{each['bytes'] / 1e9:.1f}",
                    f"{each['flops'] / 1e12:.2f}",
                    f"{1e3 * each['floor_s']:.1f}",
                    f"{each['memory'] / 1e9:.1f}",
                ]
                for each in result["decode"]
            ],
        ),
    ]
    return "\n\n".join(text)


def _verdict(result: dict[str, Any]) -> str:
    gpu = result["gpu"]
    peak = max(stage["total"] for stage in result["memory"].values())
    room = f"{gpu['usable'] / 1e9:.1f} of {gpu['memory'] / 1e9:.0f} GB"
    host = result["host_bytes_per_process"]
    extra = f" CPU memory: {host / 1e9:.1f} GB per process." if host else ""
    if result["fits"]:
        return f"fits: {peak / 1e9:.1f} GB of {room} (the rest for fragmentation).{extra}"
    advice = [f"{text}: {total / 1e9:.1f} GB" for text, total in result["changes"]]
    if result["gpus_that_fit"]:
        advice.append(f"{result['gpus_that_fit']} GPUs with FSDP2")
    tips = "\n".join(f"- {tip}" for tip in advice) or "- larger GPUs: no change of this run is enough"
    return f"does NOT fit: {peak / 1e9:.1f} GB, and {room} can be used.{extra} What would fit:\n{tips}"
