"""`flashar benchmark train`: a training step of both stages, next to a plain implementation.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import datetime
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.benchmarking.table import markdown
from flashar_pl.console import versions
from flashar_pl.devices import find_device
from flashar_pl.files import require_new, write_json
from flashar_pl.options import parse_grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flashar_pl.models import GridModel

LOSSES = ("chunked", "plain")
"""This package's loss, and the one that holds three logit tensors."""


def benchmark_train(
    *,
    preset: str | None = None,
    layers: int | None = None,
    lora: int | None = None,
    batch_size: int = 4,
    grid: str = "16x16",
    dtype: Literal["fp32", "bf16"] = "bf16",
    repeats: int = 5,
    threads: int = 1,
    device: str = "auto",
    out: str | None = None,
) -> dict[str, Any]:
    """Time and memory of a training step: forward, backward, AdamW.

    Both stages, with this package's loss and with a plain one that holds all logits of both heads and of their mix in
    float32; everything else is the same (frozen roles through requires_grad, SDPA, float32 weights). The two take
    turns. Needs no data and no download.

    Example:
        flashar benchmark train --preset llamagen-b --batch-size 4

    Args:
        preset: published size with random weights. Default: the smallest of the first family.
        layers: use only so many layers.
        lora: freeze the backbone and train low-rank updates of this rank; its weights are kept in dtype. Needs peft.
        batch_size: samples of a step.
        grid: code grid HEIGHTxWIDTH.
        dtype: bf16 is autocast over float32 weights; fp32 computes in float32.
        repeats: measured steps of each kind, after one that does not count.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        out: also write the numbers to this new JSON file.
    """
    command = dict(locals())
    import torch

    from flashar_pl.backbones import presets
    from flashar_pl.benchmarking.measure import clock_name
    from flashar_pl.benchmarking.rows import device_name
    from flashar_pl.models.lora import LoraConfig, adapt, frozen_names

    if min(batch_size, repeats, threads) < 1:
        raise ValueError(f"batch_size is {batch_size}, repeats {repeats}, threads {threads}; expected 1 or more.")
    if layers is not None and layers < 1:
        raise ValueError(f"layers is {layers}; expected 1 or more.")
    preset = command["preset"] = next(iter(presets())) if preset is None else preset
    adapted = None if lora is None else LoraConfig(rank=lora, base=dtype)
    if out is not None:
        require_new(out, "benchmark")
    place, shape = find_device(device), parse_grid(grid)
    assert shape is not None
    model = adapt(_model(preset, layers, place), adapted)
    before = torch.get_num_threads()
    try:
        if place.type == "cpu":
            torch.set_num_threads(threads)
        bench = Steps(model, batch_size, shape, dtype == "bf16", place)
        rows = [row for stage in (1, 2) for row in bench.stage(stage, repeats)]
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "device": device_name(place),
            "clock": clock_name(place),
            "threads": threads if place.type == "cpu" else None,
            "parameters": {role: count for role, count in _role_counts(model).items() if count},
            "frozen": sum(model.get_parameter(name).numel() for name in frozen_names(model)),
            "rows": rows,
            "versions": versions(),
        }
    finally:
        torch.set_num_threads(before)
    print(report(result))
    if out is not None:
        write_json(out, result)
    return result


def _model(preset: str, layers: int | None, device: torch.device) -> GridModel:
    import torch

    from flashar_pl.backbones import build_backbone
    from flashar_pl.models import FlashAR

    torch.manual_seed(0)
    backbone = build_backbone({"preset": preset} if layers is None else {"preset": preset, "n_layer": layers})
    if backbone.conditioning.kind != "class":
        raise ValueError(f"{preset} is conditioned on text; expected a class-conditional size.")
    torch.nn.init.normal_(backbone.head.weight, std=0.02)
    return FlashAR(backbone, backbone.n_layer - 1).to(device).train()


def _role_counts(model: GridModel) -> dict[str, int]:
    roles, counts = model.roles(), dict[str, int]()
    for name, parameter in model.named_parameters():
        counts[roles[name]] = counts.get(roles[name], 0) + parameter.numel()
    return counts


class Steps:
    """Training steps of one model on one batch."""

    def __init__(self, model: GridModel, batch: int, grid: tuple[int, int], mixed: bool, device: torch.device) -> None:
        import torch

        from flashar_pl.models.lora import frozen_names

        generator = torch.Generator().manual_seed(0)
        self.model, self.mixed, self.device = model, mixed, device
        self.plan = model.default_plan(*grid)
        vocabulary = model.backbone.vocabulary
        self.codes = torch.randint(0, vocabulary, (batch, *grid), generator=generator).to(device)
        self.condition = (torch.arange(batch) % 1000).to(device)
        self.frozen = frozen_names(model)
        trained = [parameter for name, parameter in model.named_parameters() if name not in self.frozen]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self._states: tuple[Tensor, Tensor] | None = None

    def freeze(self, stage: int) -> None:
        """Only what trains in this stage has gradients and optimizer state."""
        from flashar_pl.planner.training import STAGE1

        roles = self.model.roles()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.frozen and (stage == 2 or roles[name] in STAGE1))
            parameter.grad = None
        self.optimiser.state.clear()

    def autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def loss(self, kind: str) -> Tensor:
        """The training loss by one of `LOSSES`."""
        from flashar_pl.benchmarking.plain_loss import plain_loss

        with self.autocast():
            if kind == "plain":
                return plain_loss(self.model, self.codes, self.condition, self.plan)
            return self.model.loss(self.codes, self.condition, self.plan)["loss"]

    def step(self, kind: str) -> None:
        """One optimizer step."""
        self.loss(kind).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def given_states(self) -> tuple[Tensor, Tensor]:
        """Hidden states of both branches, as leaves that have gradients where something below the heads trains."""
        import torch

        from flashar_pl.benchmarking.plain_loss import hidden_states

        if self._states is None:
            with torch.no_grad(), self.autocast():
                h, v = hidden_states(self.model, self.codes, self.condition, self.plan)
            assert v is not None
            self._states = h, v
        frozen = not self.model.dual_head.horizontal.weight.requires_grad
        h, v = (states.detach() for states in self._states)
        return h.requires_grad_(not frozen), v.requires_grad_()

    def loss_alone(self, kind: str) -> int:
        """Forward and backward of the loss from given hidden states; bytes of the parameters' gradients."""
        from flashar_pl.benchmarking.plain_loss import head_loss

        h, v = self.given_states()
        self.model.zero_grad()
        with self.autocast():
            if kind == "plain":
                loss = head_loss(self.model, (h, v), self.codes, self.plan)
            else:
                total = self.model.dual_head.losses(h, v, self.codes.flatten(1), self.plan).total
                loss = total / self.codes.numel()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad()
        return gradients

    def stage(self, stage: int, repeats: int) -> list[dict[str, Any]]:
        """Rows of both losses in one stage."""
        from flashar_pl.benchmarking.measure import Timing, clock, clock_name
        from flashar_pl.devices import peak_memory

        self.freeze(stage)
        timings: dict[str, Timing] = {kind: Timing() for kind in LOSSES}
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
                {
                    "stage": stage,
                    "loss": kind,
                    "time": timed,
                    "seconds": seconds,
                    "tokens_per_s": self.codes.numel() / seconds,
                    "peak_bytes": whole.bytes,
                    "step_bytes": whole.extra,
                    **self.loss_memory(kind),
                }
            )
        return rows

    def loss_memory(self, kind: str) -> dict[str, int | None]:
        """Peak of the loss alone, forward and backward, from given hidden states.

        Not counted are the gradients of the heads and of the gate, which every implementation ends with. Everything
        else is: logits, low-precision copies of weights, partial sums, gradients of the hidden states.

        Returns "loss_bytes", of tensors; and on a CPU "loss_resident_bytes", of the process, with what the allocator
        and scratch space of the operators add.
        """
        from flashar_pl.benchmarking.memory import TensorPeak
        from flashar_pl.devices import peak_memory

        with peak_memory(self.device) as resident:
            gradients = self.loss_alone(kind)
        measured = max(0, resident.extra - gradients)
        if self.device.type == "cuda":
            return {"loss_bytes": measured, "loss_resident_bytes": None}
        with TensorPeak() as exact:
            gradients = self.loss_alone(kind)
        return {"loss_bytes": exact.bytes - gradients, "loss_resident_bytes": measured}


def report(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    header = ("stage", "loss", "ms/step", "tokens/s", "step MiB", "loss MiB", "repeats")
    lines = [
        [
            str(row["stage"]),
            row["loss"],
            f"{1e3 * row['seconds']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['step_bytes'] / 2**20:.0f}",
            f"{row['loss_bytes'] / 2**20:.0f}",
            str(row["time"]["repeats"]),
        ]
        for row in result["rows"]
    ]
    command = result["command"]
    clock = "processor time" if result["clock"] == "cpu" else "wall time"
    frozen = f", {result['frozen']:,} of them frozen (LoRA of rank {command['lora']})" if result["frozen"] else ""
    head = (
        f"{result['device']}; {command['preset']}, {sum(result['parameters'].values()):,} parameters{frozen}, "
        f"batch {command['batch_size']}, grid {command['grid']}, {command['dtype']}; medians of {clock}; "
        "memory of a step beyond weights and optimizer state, of the loss beyond gradients."
    )
    return head + "\n\n" + markdown(header, lines)
