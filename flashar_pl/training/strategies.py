"""Where strategies differ: how a model is built and gets its first weights, and what they must know of freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

from flashar_pl.checkpoints.description import build_model
from flashar_pl.checkpoints.initialise import InitReport, initialise
from flashar_pl.checkpoints.official import is_official_directory
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import LoraConfig, adapt
from flashar_pl.tensor_files import is_sharded
from flashar_pl.training.lightning_private import ddp_options
from flashar_pl.training.new_parts import new_parts
from flashar_pl.training.sharded.strategy import ShardedStrategy


def new_model(config: dict[str, Any], strategy: Strategy | None, lora: LoraConfig | None = None) -> GridModel:
    """The model of `build_model(config)` in float32: with random weights, or cut into shards that wait for theirs.

    lora: adapts its backbone, whose frozen weights may be bfloat16.

    Raises:
        ValueError: peft is missing, or bfloat16 weights would meet float32 activations.
    """
    if isinstance(strategy, ShardedStrategy):
        return strategy.build(config, lora)
    precision = "bf16-mixed" if strategy is None else strategy.precision_plugin.precision
    if lora is not None and lora.base == "bf16" and precision != "bf16-mixed":
        raise ValueError(
            f"model.lora.base is bf16 and trainer.precision {precision}; expected bf16-mixed, a sharded strategy, or "
            "model.lora.base fp32."
        )
    return adapt(build_model(config).float(), lora)


def first_weights(model: GridModel, path: str | None, strategy: Strategy | None) -> InitReport | None:
    """The weights a run starts from: those of `path`, else random ones, equal for a seed on all strategies and numbers
    of devices. Raises ValueError as `initialise` does."""
    if isinstance(strategy, ShardedStrategy):
        return strategy.start(model, path)
    if path is None:
        return None
    if is_official_directory(path):
        for part, whole in new_parts(model):
            part.load_state_dict(whole.state_dict())
    return initialise(model, path)


def check_strategy(strategy: Strategy) -> None:
    """ValueError for a strategy that stages were not made for, such as Lightning's ModelParallelStrategy: it cuts
    nothing by itself, and every device would train a model of its own."""
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}; expected auto, ddp, or, to cut a model over devices, "
            "class_path: flashar_pl.training.ShardedStrategy."
        )


def check_cut(model: GridModel, strategy: Strategy | None) -> None:
    """ValueError for a whole model in a sharded run, as `load_from_checkpoint` returns."""
    if isinstance(strategy, ShardedStrategy) and not model.sharded:
        raise ValueError(
            "this module has whole weights, and a sharded run cuts its model while it is built; make the module anew "
            "with FlashARModule(...) and give the Trainer the checkpoint: fit(module, ckpt_path=...)."
        )


def check_checkpoint_kind(path: str | Path, strategy: Strategy) -> None:
    """ValueError for a sharded checkpoint and a strategy that cannot read it."""
    if is_sharded(path) and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"{path} is a sharded checkpoint; continue it with flashar_pl.training.ShardedStrategy "
            "(one device will do). To start another kind of run from its weights set model.init_from."
        )


def finish_saving(strategy: Strategy) -> None:
    """Wait until a checkpoint that is written in the background is whole. Raises OSError where it could not be."""
    if isinstance(strategy, ShardedStrategy) and strategy.saving is not None:
        strategy.saving.finish()


def saving_failed(strategy: Strategy) -> bool:
    """Whether `finish_saving` would raise at once, on this device: others may not know yet."""
    return isinstance(strategy, ShardedStrategy) and strategy.saving is not None and strategy.saving.failed


def allow_frozen_parameters(strategy: Strategy) -> None:
    """Let DDP skip parameters that are frozen in a stage, and hold gradients once; call it before the model is wrapped.

    DDP decides at the wrap which parameters it synchronises: one that was frozen then would drift apart on the ranks
    once it trains. So the stages freeze after the wrap, and DDP looks for parameters without gradient in every step.

    Raises:
        ValueError: the strategy was told explicitly not to look for unused parameters, or that they stay the same.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    options = ddp_options(strategy)
    options.setdefault("gradient_as_bucket_view", True)  # gradients live in DDP's buckets: else a second set of them
    if options.get("static_graph"):
        raise ValueError(
            "trainer.strategy has static_graph=True, but stage 2 trains other parameters than stage 1; leave it out."
        )
    if options.setdefault("find_unused_parameters", True) is False:
        raise ValueError(
            "trainer.strategy has find_unused_parameters=False, but stage 1 trains a part of the parameters only; "
            "use trainer.strategy auto or ddp."
        )
