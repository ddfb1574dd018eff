"""Published rates of GPUs, and what to change where a training run does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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


GPUS: dict[str, Gpu] = {
    "h20": Gpu(148e12, 4.0e12, 96),
    "h100": Gpu(989e12, 3.35e12, 80),
    "h200": Gpu(989e12, 4.8e12, 141),
    "a100": Gpu(312e12, 2.04e12, 80),
}
"""SXM models; the paper used H20."""


def changes(setup: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    """Single changes that need less memory, the cheapest in time first."""
    if setup.gpus > 1 and not setup.sharded:
        yield "shard with FSDP2", replace(setup, sharded=True)
    if setup.replicas > 1:
        yield "one replica instead of several", replace(setup, replicas=1)
    if setup.lora is not None and setup.lora.base == "fp32" and setup.mixed:
        yield (
            "frozen weights in bfloat16 (model.lora.base: bf16)",
            replace(setup, lora=replace(setup.lora, base="bf16")),
        )
    if setup.moments == "fp32":
        yield "bfloat16 optimizer state (model.optimiser.state: bf16)", replace(setup, moments="bf16")
    if setup.moments != "8bit":
        yield "8-bit optimizer state (model.optimiser.state: 8bit)", replace(setup, moments="8bit")
    if not setup.checkpointing:
        yield "activation checkpointing", replace(setup, checkpointing=True)
    if setup.samples > 1:
        half = setup.samples // 2
        accumulate = -(-setup.samples * setup.accumulate // half)
        fewer = replace(setup, samples=half, accumulate=accumulate)
        yield f"{half} sample(s) per GPU and {accumulate} forwards{batch_settings(fewer)}", fewer
    if setup.ema:
        yield "no averaged weights", replace(setup, ema=False)
    if not setup.offload:
        option = "trainer.strategy.init_args.offload: true"
        yield (
            f"FSDP2 with shards and optimizer state in CPU memory ({option})",
            replace(setup, offload=True, sharded=True),
        )


def batch_settings(setup: TrainingSetup) -> str:
    """How a YAML says it."""
    batch = setup.samples * setup.gpus
    return f" (data.batch_size: {batch}, trainer.accumulate_grad_batches: {setup.accumulate})"


def what_would_fit(sizes: ModelSizes, setup: TrainingSetup, usable: int) -> list[tuple[str, int]]:
    """Changes after which the run fits into `usable` bytes per GPU, each with its new total; else one list of changes
    made one after the other. Empty where nothing helps but more or larger GPUs."""
    single = [(text, peak_total(sizes, after)) for text, after in changes(setup)]
    if setup.lora is None and sizes.flashar and setup.mixed:
        frozen = LoraConfig(base="bf16")
        text = f"a frozen backbone with LoRA (model.lora: {{rank: {frozen.rank}, base: bf16}})"
        single.append((text, peak_total(sizes, replace(setup, lora=frozen))))
    if found := [(text, total) for text, total in single if total <= usable]:
        return found
    texts: list[str] = []
    samples = setup.samples
    for _ in range(32):  # batch sizes can be halved often
        best = min(changes(setup), key=lambda change: peak_total(sizes, change[1]), default=None)
        if best is None:
            break
        if best[1].samples < setup.samples < samples:  # halved again: the smaller number stands for both
            texts = [text for text in texts if not text.endswith(batch_settings(setup))]
        texts.append(best[0])
        setup = best[1]
        if peak_total(sizes, setup) <= usable:
            return [("; ".join(texts), peak_total(sizes, setup))]
    return []


def gpus_that_fit(sizes: ModelSizes, setup: TrainingSetup, usable: int) -> int | None:
    """Smallest doubling of the GPUs with which the run fits unchanged under FSDP2; None = no number helps."""
    for factor in (2, 4, 8, 16, 32, 64):
        if peak_total(sizes, replace(setup, gpus=setup.gpus * factor, sharded=True, replicas=1)) <= usable:
            return setup.gpus * factor
    return None
