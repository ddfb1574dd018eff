"""`flashar benchmark train`: a training step of both stages, next to a plain implementation.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.console import table
from flashar_pl.files import require_new, write_json
from flashar_pl.options import DeviceOptions, PresetOptions, as_settings, check_least

if TYPE_CHECKING:
    import torch

    from flashar_pl.benchmarking.subjects import Subject
    from flashar_pl.benchmarking.train import Steps

BATCH = 4
"""Samples of a step."""


@dataclass(frozen=True)
class StepOptions:
    """Training step"""

    layers: int | None = None
    """Use only so many layers of a preset."""
    lora: int | None = None
    """Freeze the backbone and train low-rank updates of this rank; its weights are kept in --dtype. Needs peft."""
    repeats: int = 5
    """Measured steps of each kind, after one that does not count."""
    threads: int = 1
    """CPU threads."""
    out: str | None = None
    """Also write the numbers to this new JSON file."""

    def __post_init__(self) -> None:
        check_least(self, repeats=1, threads=1, layers=1)


def benchmark_train(
    model: PresetOptions, step: StepOptions = StepOptions(), compute: DeviceOptions = DeviceOptions()
) -> dict[str, Any]:
    """Time and memory of a training step: forward, backward, AdamW.

    Both stages, with this package's loss and with a plain one that holds all logits of both heads and of their mix in
    float32; everything else is the same (frozen roles through requires_grad, SDPA, float32 weights, autocast with
    --dtype bf16). The two take turns. Needs no data and no download.

    Example:
        flashar benchmark train --preset llamagen-b --batch-size 4 --dtype bf16
    """
    from flashar_pl.benchmarking.measure import circumstances, cpu_threads
    from flashar_pl.benchmarking.subjects import Subject
    from flashar_pl.devices import find_device

    if step.out is not None:
        require_new(step.out, "benchmark")
    device, dtype = find_device(compute.device), compute.dtype or "fp32"
    if dtype == "fp16":
        raise ValueError("dtype is fp16, which training does not use; expected fp32 or bf16.")
    batch = compute.batch_size if isinstance(compute.batch_size, int) else BATCH
    subject = Subject.of(model, device, layers=step.layers)
    if not subject.sizes.flashar:
        raise ValueError("a raster model has no second stage; give --branch-layer, or a FlashAR checkpoint.")
    with cpu_threads(device, step.threads):
        steps = make_steps(subject, batch, step, device, dtype)
        rows = [row for stage in (1, 2) for row in steps.stage(stage, step.repeats)]
        result: dict[str, Any] = {
            **circumstances(device, step.threads),
            "command": as_settings(model, step, compute) | {"dtype": dtype, "batch_size": batch},
            "grid": list(subject.grid),
            "parameters": {role: count for role, count in subject.sizes.parameters.items() if count},
            "frozen": sum(steps.model.get_parameter(name).numel() for name in steps.frozen),
            "rows": rows,
        }
    print(report(result))
    if step.out is not None:
        write_json(step.out, result)
    return result


def make_steps(
    subject: Subject, batch: int, step: StepOptions, device: torch.device, dtype: Literal["fp32", "bf16"]
) -> Steps:
    """The model in training, its optimizer, and a batch."""
    import torch

    from flashar_pl.benchmarking.train import Steps
    from flashar_pl.models.lora import LoraConfig, adapt
    from flashar_pl.training.config import OptimiserConfig
    from flashar_pl.training.optim import adamw

    torch.manual_seed(0)
    model = subject.model(device, torch.float32).requires_grad_(True)
    model = adapt(model, None if step.lora is None else LoraConfig(rank=step.lora, base=dtype)).train()
    codes = torch.randint(0, subject.sizes.backbone.vocabulary, (batch, *subject.grid)).to(device)
    condition = subject.condition(batch, False)[0].to(device)
    return Steps(model, adamw(model, OptimiserConfig(lr=1e-5)), codes, condition, dtype != "fp32")


def report(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        [f"{row['stage']}, {row['loss']}", f"{1e3 * row['seconds']:.0f}", f"{row['tokens_per_s']:.0f}"]
        + [
            f"{row[name] / 2**20:.0f}" if row["peak_bytes"] else "unknown"
            for name in ("peak_bytes", "step_bytes", "loss_bytes")
        ]
        + [str(row["time"]["repeats"])]
        for row in result["rows"]
    ]
    command, clock = result["command"], "processor time" if result["clock"] == "cpu" else "wall time"
    frozen = f", {result['frozen']:,} of them frozen (LoRA of rank {command['lora']})" if result["frozen"] else ""
    head = (
        f"{result['device']}; {command['preset'] or command['checkpoint']}, {sum(result['parameters'].values()):,} "
        f"parameters{frozen}, batch {command['batch_size']}, grid {'x'.join(map(str, result['grid']))}, "
        f"{command['dtype']}; medians of {clock}; step beyond weights and optimizer state, loss beyond gradients.\n\n"
    )
    return head + table(("stage, loss", "ms/step", "tokens/s", "peak MiB", "step MiB", "loss MiB", "repeats"), lines)
