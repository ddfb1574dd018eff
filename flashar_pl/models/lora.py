"""LoRA (Hu et al., 2021) on the backbone of a grid model: W x + (alpha / rank) B A x, with W frozen.

peft makes the adapted layers. Everything else of the backbone is frozen too; heads, vertical branch and gate are left
alone. B starts at 0, so an adapted model computes what it computed before. peft is needed to train: a stored model is
merged while it is read (`merge`), and is a plain one from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from flashar_pl.console import needing
from flashar_pl.models.quiet import quiet_torchao
from flashar_pl.numerics import dtype_from_name

if TYPE_CHECKING:
    from flashar_pl.models.base import GridModel

Target = Literal["wqkv", "wo", "w13", "w2"]
TARGETS: tuple[Target, ...] = ("wqkv", "wo", "w13", "w2")
"""Projections of a block: queries, keys and values; attention output; feed-forward input and output."""
ADAPTER = "default"
"""peft's name of the one adapter."""
ADDED, BASE = ".lora_", ".base_layer."
"""What the names of added matrices contain, and those of adapted layers."""


@dataclass(frozen=True)
class LoraConfig:
    """Frozen backbone with a trained low-rank update of its projections."""

    rank: int = 64
    """Rank of the update of every matrix."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; null = the rank, so that the scale is 1 whatever the rank."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    targets: tuple[Target, ...] = TARGETS
    """Projections that get an update: wqkv, wo, w13, w2."""
    base: Literal["fp32", "bf16"] = "fp32"
    """What frozen weights are kept in; trained ones are float32. bf16 loses nothing where the weights come as such."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "alpha", float(self.rank if self.alpha is None else self.alpha))
        if self.rank < 1 or self.scale <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank is {self.rank}, alpha {self.alpha}, dropout {self.dropout}; expected rank >= 1, alpha > 0, "
                "0 <= dropout < 1."
            )
        if not self.targets or not set(self.targets) <= set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets is {list(self.targets)}; expected some of {', '.join(TARGETS)}, each once.")
        if self.base not in ("fp32", "bf16"):
            raise ValueError(f"lora.base is {self.base!r}; expected fp32 or bf16.")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        assert self.alpha is not None
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain types, from which the constructor makes an equal object."""
        return {**asdict(self), "targets": list(self.targets)}


def adapt(model: GridModel, config: LoraConfig | None) -> GridModel:
    """Freeze the backbone of `model` and add low-rank updates to its blocks, in place. None = leave it as it is.

    The model may be on the meta device. The dtype of added matrices is that of the model before.

    Raises:
        ValueError: peft is not installed, or an `IntraHead` trains alone.
    """
    if config is None:
        for name in frozen_names(model):  # by an `IntraHead` that trains alone
            model.get_parameter(name).requires_grad_(False)
        return model
    if frozen_names(model):
        raise ValueError("model.lora is given, and model.flashar.intra.alone freezes what it adapts; leave one out.")
    with needing("model.lora", "lora"), quiet_torchao():
        import peft
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(Any, config.alpha),
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
    )
    blocks = model.backbone.blocks
    on_meta = next(blocks.parameters()).is_meta
    with quiet_torchao():
        peft.inject_adapter_in_model(options, blocks, ADAPTER, low_cpu_mem_usage=on_meta)
    cast(Any, model).lora = config
    names = frozen_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
        if name in names:
            parameter.data = parameter.data.to(dtype_from_name(config.base))
    return model


def adaptation(model: GridModel) -> LoraConfig | None:
    """How `model` was adapted; None = it was not."""
    return cast("LoraConfig | None", getattr(model, "lora", None))


def frozen_names(model: GridModel) -> set[str]:
    """Names of the parameters that never train: the backbone's own, where it is adapted; all but those of an
    `IntraHead` that is trained alone."""
    if model.dual_head.intra is not None and model.dual_head.intra.alone:
        return {name for name in model.roles() if not name.startswith("dual_head.intra.")}
    if adaptation(model) is None:
        return set()
    return {name for name, role in model.roles().items() if role == "backbone" and ADDED not in name}


def adapted_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name in it, layer) of every adapted layer."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "lora_A") and hasattr(child, "base_layer")
    ]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, `model` has its plain layers, with their names and weights. For whatever reads weights into a model."""
    adapted = adapted_layers(model)
    for parent, name, layer in adapted:
        setattr(parent, name, layer.base_layer)
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)


def added_parameters(model: nn.Module) -> int:
    """Number of parameters that adapting has added."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ADDED in name)


def merge(state: dict[str, Tensor], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the plain model: W + alpha / rank * B A, in float32 or wider. Empties `state` on the way."""
    for name in [name for name in state if ADDED not in name]:
        value = state.pop(name)
        if value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, torch.float32))
        layer, _, kind = name.rpartition(BASE)
        if kind == "weight":
            a, b = (state.pop(f"{layer}.lora_{which}.{ADAPTER}.weight").to(value.dtype) for which in "AB")
            yield f"{layer}.weight", torch.addmm(value, b, a, alpha=config.scale)
        else:
            yield name.replace(BASE, "."), value
    assert not state, f"added matrices without a layer: {', '.join(list(state)[:4])}"
