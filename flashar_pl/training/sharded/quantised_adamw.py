"""torchao's AdamW with moments of 8 bits, on shards.

Its step compiles one function for each kind of parameter. Given a DTensor, torch takes the compiled code from a cache
that processes share, under a key that does not say how much of the parameter is on this device: where some device holds
no rows, such as of the gate's last layer, its empty code was run by the one that does, and they never trained. So the
function gets plain local tensors here, and is not called for empty ones.

`_new_buffer`, "a moment of this parameter", is a private name of torchao, which has no public one for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashar_pl.layers.torch_private import recompile_limit
from flashar_pl.models.quiet import quiet_torchao
from flashar_pl.training.sharded.compact_adamw import ByParameter
from flashar_pl.training.sharded.units import local


def quantised_adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """`torchao.optim.AdamW8bit` over parameter groups, sharded or not.

    Raises:
        ImportError: torchao is not installed.
    """
    with quiet_torchao():
        from torchao.optim import AdamW8bit
        from torchao.optim.adam import single_param_adam

    class QuantisedAdamW(ByParameter, AdamW8bit):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with recompile_limit(sys.maxsize):
                return super().step(closure)

        def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = self._new_buffer(parameter, True)
                state["exp_avg_sq"] = self._new_buffer(parameter, False)
            state["step"] += 1
            here = local(parameter.detach())
            if here.numel():
                assert parameter.grad is not None
                moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
                torch.compile(single_param_adam, fullgraph=True, dynamic=False)(
                    here, local(parameter.grad), state["step"], *moments, None, group["lr"], *group["betas"],
                    group["weight_decay"], group["eps"], self.is_adamw, False,
                )  # fmt: skip

    return QuantisedAdamW(groups, lr=lr, betas=betas)  # type: ignore[call-arg]
