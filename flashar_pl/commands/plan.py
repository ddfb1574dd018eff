"""`flashar plan`: memory, time and decoding floor of a training run, by arithmetic; decoding time, predicted.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from flashar_pl.files import require_new, write_json
from flashar_pl.options import ArchitectureOptions, RunnerOptions, SharingOptions, check_least, parse_grid

if TYPE_CHECKING:
    from flashar_pl.planner.advice import Gpu
    from flashar_pl.planner.sizes import ModelSizes
    from flashar_pl.training.planned import PlannedRun

Switch = Literal["on", "off"]
SWITCH: dict[str | None, bool] = {"on": True, "off": False}


@dataclass(frozen=True)
class RunOptions(ArchitectureOptions):
    """Run"""

    config: list[str] | None = None
    """YAML of a training run; of several the later wins, key by key, as for fit."""
    preset: str | None = None
    """A published size as FlashAR instead of a file, such as llamagen-b; a wrong name lists them."""
    checkpoint: str | None = None
    """A checkpoint instead of a file: its sizes, and its grid where it says one. Its weights are read."""
    strategy: Literal["fsdp", "ddp"] | None = None
    """fsdp (sharded) or ddp (everything on every GPU, also for one GPU). Default: the file's."""
    batch: int | None = None
    """Global batch of one forward, over all GPUs. Default: the file's."""
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
        if isinstance(self.config, str):  # from Python
            object.__setattr__(self, "config", [self.config])
        named = self.preset is not None or self.backbone_class is not None
        if (self.config is not None) + (self.checkpoint is not None) + named != 1:
            raise ValueError(
                "give either --config experiments/NAME.yaml, --preset NAME or --backbone-class PATH, or --checkpoint."
            )
        if self.batch is not None and (self.config is None or self.batch < 1):
            raise ValueError(f"batch is {self.batch}; expected 1 or more, with --config. A preset takes --samples.")
        check_least(self, prefix=0)

    def setup(self, gpus: int) -> dict[str, Any]:
        """What was typed, as fields of `TrainingSetup`."""
        given = {name: getattr(self, name) for name in ("samples", "replicas", "moments", "prefix")} | {
            "gpus": gpus,
            "sharded": None if self.strategy is None else self.strategy == "fsdp",
            "offload": SWITCH.get(self.offload),
            "checkpointing": SWITCH.get(self.checkpointing),
            "grid": parse_grid(self.grid),
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
        check_least(self, gpus=1, gpu_memory=1)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; expected 0 < mfu <= 1.")


@dataclass(frozen=True)
class DecodingOptions(SharingOptions, RunnerOptions):
    """Decoding"""

    decode: bool = False
    """Predict the time of decoding one guided image from counted kernels and assumed constants: low, central, high. No
    GPU has confirmed it. A model of 34 billion parameters takes half a minute to count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runner != "auto" and not self.decode:
            raise ValueError(f"runner is {self.runner}, which only a predicted decoding has; add --decode.")
        if self.runner.startswith("compiled"):
            raise ValueError(
                f"runner is {self.runner}, which --decode cannot predict; expected graphs, fused or eager."
            )

    @property
    def predicted(self) -> Literal["graphs", "fused", "eager"]:
        """The runner, auto as on a GPU."""
        return cast(Literal["graphs", "fused", "eager"], "graphs" if self.runner == "auto" else self.runner)


def plan(
    options: RunOptions,
    hardware: HardwareOptions = HardwareOptions(),
    decoding: DecodingOptions = DecodingOptions(),
    *,
    out: str | None = None,
) -> dict[str, Any]:
    """Say what a training run needs before it is started: parameters, bytes per GPU, hours, and the decoding floor.

    Everything is arithmetic on the configuration; no weights, data or GPU are needed. Options given here win over the
    file. Communication is not in the time: it is hidden or part of the stated MFU. GB are 10^9 bytes.

    Example:
        flashar plan --config experiments/llamagen_l_256.yaml --gpus 8 --gpu-memory 96
        flashar plan --preset llamagen-l --gpu h200 --decode --runner fused

    Args:
        out: also write the numbers to this new JSON file.
    """
    from flashar_pl.planner.advice import GPUS, gpus_that_fit, what_would_fit
    from flashar_pl.planner.report import report
    from flashar_pl.planner.training import added, host_bytes, memory_of_stages, training_time, usable

    if out is not None:
        require_new(out, "plan")
    run = planned_run(options, hardware.gpus)
    sizes, setup = run.sizes, run.setup
    rates = GPUS[hardware.gpu]
    memory = int(1e9 * (hardware.gpu_memory or rates.memory))
    stages, room = memory_of_stages(sizes, setup), usable(memory)
    fits = max(stage.total for stage in stages.values()) <= room
    result: dict[str, Any] = {
        "config": " ".join(options.config or ()) or options.checkpoint or options.preset or options.backbone_class,
        "setup": asdict(setup),
        "notes": run.notes,
        "parameters": sizes.parameters | ({} if setup.lora is None else {"lora": added(sizes, setup.lora)}),
        "memory": {f"stage{stage}": {**asdict(each), "total": each.total} for stage, each in stages.items()},
        "host_bytes_per_process": host_bytes(sizes, setup),
        "gpu": {"name": hardware.gpu, **asdict(rates), "memory": memory, "usable": room},
        "fits": fits,
        "changes": [] if fits else what_would_fit(sizes, setup, room),
        "gpus_that_fit": None if fits else gpus_that_fit(sizes, setup, room),
        "mfu": hardware.mfu,
        "time": training_time(sizes, setup, rates.flops, hardware.mfu),
        "decode": decode_floors(sizes, setup.grid, setup.prefix, rates, decoding),
    }
    print(report(result))
    if out is not None:
        write_json(out, result)
    return result


def planned_run(options: RunOptions, gpus: int) -> PlannedRun:
    """The file's run; or a published size, or a backbone of the user's, as FlashAR at its usual branch layer unless
    told. What was typed wins."""
    from flashar_pl.checkpoints.repositories import locate
    from flashar_pl.checkpoints.weights import load_model
    from flashar_pl.planner.sizes import model_sizes, named_sizes
    from flashar_pl.training.planned import PlannedRun

    given = options.setup(gpus)
    if options.config is not None:
        run = PlannedRun.of_files(options.config, gpus, options.batch)
        if options.samples is not None:
            given["accumulate"] = max(1, -(-run.setup.samples * run.setup.accumulate // max(1, options.samples)))
    elif options.checkpoint is not None:
        loaded = load_model(locate(options.checkpoint, options.download))
        config = loaded.model.config()
        if options.branch_layer is not None:
            config = {"backbone": config["backbone"], "branch_layer": options.branch_layer}
        run = PlannedRun.of_model(model_sizes(config), gpus, loaded.description.grid)
    else:
        sizes = named_sizes(options.preset, options.backbone_class, options.branch_layer)
        run = PlannedRun.of_model(sizes, gpus)
    return replace(run, setup=replace(run.setup, **given))


def decode_floors(
    sizes: ModelSizes, grid: tuple[int, int], prefix: int | None, rates: Gpu, decoding: DecodingOptions
) -> list[dict[str, Any]]:
    """Bytes, FLOPs and lower bounds of decoding one guided image in bfloat16, of each device, for every plan the model
    can run; and predictions. ValueError where these are wanted and no plan has one, or devices cannot share the model.
    """
    from flashar_pl.planner.cost import prediction
    from flashar_pl.planner.decode import DecodeJob

    plans = () if "blocks" in sizes.model.plans else sizes.model.plans  # whose grid has a clean copy as a second image
    jobs = [DecodeJob(sizes, plan, grid, prefix=prefix, devices=decoding.tensor_parallel) for plan in plans]
    predicted = [prediction(job, decoding.predicted, rates) if decoding.decode else None for job in jobs]
    if decoding.decode and not any(predicted):
        kind = sizes.config["kind"]
        raise ValueError(f"--decode predicts raster and diagonal plans, and a {kind} model has neither; leave it out.")
    return [
        {
            "plan": job.plan,
            "devices": job.devices,
            "steps": len(job.forwards),
            "bytes": job.bytes,
            "flops": job.flops,
            "floor_s": job.floor(rates.bandwidth, rates.flops),
            "memory": job.memory.total,
            **(more or {}),
        }
        for job, more in zip(jobs, predicted)
    ]
