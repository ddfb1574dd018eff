"""AdamW with moments in bfloat16: 4 bytes less per parameter and moment pair than float32, which is 8.

bfloat16 has 8 bits of mantissa: rounded to the nearest, the second moment could never shrink at beta2 = 0.999. So
moments are rounded up or down at random, with probabilities that keep their expectation. The random numbers follow from
the step alone: copies of a parameter on several ranks stay equal. Weights and arithmetic are float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashar_pl.training.sharded.units import local

MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 2**25
"""Elements worked on at once: five float32 temporaries of them are 0.7 GB."""


class ByParameter(torch.optim.Optimizer, ABC):
    """An optimiser that updates one parameter after another, by `_update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of a parameter that has a gradient, with the settings of its group."""


class CompactAdamW(ByParameter):
    """As torch.optim.AdamW on float32 parameters, sharded or not, but `exp_avg` and `exp_avg_sq` are bfloat16."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser, which would widen the moments to the dtype of their parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for moment in MOMENTS:
                state[moment] = state[moment].to(torch.bfloat16)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, *(state[moment] for moment in MOMENTS))
        assert all(local(tensor).is_contiguous() for tensor in tensors if tensor is not parameter.grad)
        step = int(state["step"])
        random = torch.Generator(local(parameter).device).manual_seed(step)  # each rank's own would part the copies
        parts = [local(tensor).reshape(-1).split(CHUNK) for tensor in tensors]
        for weights, gradient, first, second in zip(*parts, strict=True):
            _adamw(weights, gradient, first, second, step, group, random)


def _adamw(
    weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any],
    random: torch.Generator,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter, Alg. 2) on vectors, in place."""
    beta1, beta2 = group["betas"]
    m = first.float().lerp_(gradient, 1 - beta1)
    v = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(round_at_random(m, random))
    second.copy_(round_at_random(v, random))
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    scale = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.addcdiv_(m, scale, value=-group["lr"] / (1 - beta1**step))


def round_at_random(x: Tensor, random: torch.Generator | None = None) -> Tensor:
    """float32 -> bfloat16: one of the two neighbours, the nearer one more often; the expectation is x."""
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=random)
    return (x.view(torch.int32).add(noise).bitwise_and_(-(2**16))).view(torch.float32).to(torch.bfloat16)
