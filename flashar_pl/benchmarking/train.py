"""Training steps of one model on one batch, measured: time, memory, and the loss alone.

Shapes: B samples, H, W grid, S' slots that are fed, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.condition import Condition
from flashar_pl.benchmarking.measure import Timing, clock, clock_name
from flashar_pl.benchmarking.plain_loss import head_loss, plain_loss
from flashar_pl.devices import peak_memory
from flashar_pl.models.base import STAGE1_ROLES, GridModel
from flashar_pl.models.lora import frozen_names

LOSSES = ("chunked", "plain")
"""This package's loss, and the one that holds three logit tensors."""


@dataclass
class Steps:
    """A model, its optimizer, and one batch."""

    model: GridModel
    optimiser: torch.optim.Optimizer
    codes: Tensor
    """(B, H, W) int64."""
    condition: Condition
    mixed: bool
    """Autocast to bfloat16."""

    def __post_init__(self) -> None:
        self.device, self.frozen = self.codes.device, frozen_names(self.model)
        self.plan = self.model.make_plan(None, *self.codes.shape[1:])
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, self.mixed)

    def freeze(self, stage: int) -> None:
        """Only what trains in this stage has gradients and optimizer state."""
        roles = self.model.roles()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.frozen and (stage == 2 or roles[name] in STAGE1_ROLES))
            parameter.grad = None
        self.optimiser.state.clear()

    def step(self, kind: str) -> None:
        """One optimizer step, its loss one of `LOSSES`."""
        asked = self.codes, self.condition, self.plan
        with self.autocast():
            loss = plain_loss(self.model, *asked) if kind == "plain" else self.model.loss(*asked)["loss"]
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def loss_bytes(self, kind: str) -> int:
        """Peak of the loss alone, forward and backward, from given hidden states, without the gradients of the heads
        and the gate, which every implementation ends with. On a CPU that of the process, which is rough."""
        with torch.no_grad(), self.autocast():
            h, v = self.model.teacher_forced(
                self.codes, self.condition, self.plan, self.plan.n_inputs
            )  # (B, 1 + S', D)
        assert v is not None
        h, v = h.requires_grad_(self.model.dual_head.horizontal.weight.requires_grad), v.requires_grad_()
        with peak_memory(self.device) as peak:
            with self.autocast():
                if kind == "plain":
                    loss = head_loss(self.model, (h, v), self.codes, self.plan)
                else:
                    losses = self.model.dual_head.losses(h, v, self.codes.flatten(1), self.plan)
                    loss = losses.total / self.codes.numel()
            loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad()
        return max(0, peak.extra - gradients)

    def stage(self, stage: int, repeats: int) -> list[dict[str, Any]]:
        """Rows of both losses, which take turns, in one stage."""
        self.freeze(stage)
        timings = {kind: Timing() for kind in LOSSES}
        for i in range(repeats + 1):
            for kind in LOSSES:
                clock(lambda kind=kind: self.step(kind), self.device, timings[kind] if i else Timing())  # type: ignore[misc]
        rows = []
        for kind in LOSSES:
            with peak_memory(self.device) as whole:
                self.step(kind)
            timed = timings[kind].summary()
            seconds = timed[f"{clock_name(self.device)}_s"]
            rows.append(
                {"stage": stage, "loss": kind, "time": timed, "seconds": seconds,
                 "tokens_per_s": self.codes.numel() / seconds, "peak_bytes": whole.bytes, "step_bytes": whole.extra,
                 "loss_bytes": self.loss_bytes(kind)}
            )  # fmt: skip
        return rows
