"""Published rates of GPUs, and what to change where a training run does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashar_pl.models.lora import LoraConfig
from flashar_pl.planner.sizes import ModelSizes
from flashar_pl.planner.training import TrainingSetup, peak_total


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values; what a program reaches is lower."""

    flops: float
    """Dense bfloat16 FLOP per second."""
    bandwidth: float
    """Memory bytes per second."""
    memory: int
    """GB (10^9 bytes)."""
    link: float
    """Bytes per second to other GPUs of the machine, each way."""


GPUS: dict[str, Gpu] = {
    "h20": Gpu(148e12, 4.0e12, 96, 450e9),
    "h100": Gpu(989e12, 3.35e12, 80, 450e9),
    "h200": Gpu(989e12, 4.8e12, 141, 450e9),
    "a100": Gpu(312e12, 2.04e12, 80, 300e9),
}
"""SXM models; the paper used H20."""


CHANGES = {
    "sharded": "FSDP2",
    "replicas": "one replica instead of several",
    "lora": "frozen weights in bfloat16 (model.lora.base: bf16)",
    "moments": "smaller optimizer state (model.optimiser.state: {moments})",
    "checkpointing": "activation checkpointing",
    "samples": "{samples} sample(s) per GPU and {accumulate} forwards (data.batch_size: {batch}, "
    "trainer.accumulate_grad_batches: {accumulate})",
    "ema": "no averaged weights",
    "offload": "shards and optimizer state in CPU memory (trainer.strategy.init_args.offload: true)",
}
"""What it means that a field of a setup is another one."""


def changes(setup: TrainingSetup) -> list[TrainingSetup]:
    """Setups with one change that needs less memory, the cheapest in time first."""
    lora, half = setup.lora, max(1, setup.samples // 2)
    fewer = {"samples": half, "accumulate": -(-setup.samples * setup.accumulate // half)}
    possible: list[tuple[bool, dict[str, Any]]] = [
        (setup.gpus > 1 and not setup.sharded, {"sharded": True}),
        (setup.replicas > 1, {"replicas": 1}),
        (lora is not None and lora.base == "fp32" and setup.mixed, {"lora": lora and replace(lora, base="bf16")}),
        (setup.moments == "fp32", {"moments": "bf16"}),
        (setup.moments != "8bit", {"moments": "8bit"}),
        (not setup.checkpointing, {"checkpointing": True}),
        (setup.samples > 1, fewer),
        (setup.ema, {"ema": False}),
        (not setup.offload, {"offload": True, "sharded": True}),
    ]
    return [replace(setup, **change) for helps, change in possible if helps]


def described(before: TrainingSetup, after: TrainingSetup) -> str:
    """What was changed, with the keys of a YAML."""
    changed = [text for name, text in CHANGES.items() if getattr(before, name) != getattr(after, name)]
    return "; ".join(changed).format(**vars(after), batch=after.samples * after.gpus)


def what_would_fit(sizes: ModelSizes, setup: TrainingSetup, usable: int) -> list[tuple[str, int]]:
    """Changes after which the run fits into `usable` bytes per GPU, each with its new total; else several changes
    together. Empty where nothing helps but more or larger GPUs."""
    single = [(described(setup, after), peak_total(sizes, after)) for after in changes(setup)]
    if setup.lora is None and sizes.flashar and setup.mixed:
        frozen = LoraConfig(base="bf16")
        text = f"a frozen backbone with LoRA (model.lora: {{rank: {frozen.rank}, base: bf16}})"
        single.append((text, peak_total(sizes, replace(setup, lora=frozen))))
    if found := [(text, total) for text, total in single if total <= usable]:
        return found
    after, total = setup, usable + 1
    while total > usable and (left := changes(after)):
        total, after = min(((peak_total(sizes, each), each) for each in left), key=lambda pair: pair[0])
    return [(described(setup, after), total)] if total <= usable else []


def gpus_that_fit(sizes: ModelSizes, setup: TrainingSetup, usable: int) -> int | None:
    """Smallest doubling of the GPUs with which the run fits unchanged under FSDP2; None = no number helps."""
    more = (replace(setup, gpus=setup.gpus * 2**doublings, sharded=True, replicas=1) for doublings in range(1, 7))
    return next((each.gpus for each in more if peak_total(sizes, each) <= usable), None)
