"""Fits on one or several ranks, described by plain values, for the tests of sharded training."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from torch.distributed.tensor import DTensor
from training_toys import (
    NO_DROPOUT,
    OPTIONS,
    BackboneConfig,
    Losses,
    OptimiserConfig,
    ValidationConfig,
    fit,
    make_module,
)

from flashar_pl.checkpoints.sharded import read_meta
from flashar_pl.models import dual_head
from flashar_pl.models.lora import LoraConfig
from flashar_pl.training.preemption import StopOnSignal
from flashar_pl.training.sharded.strategy import ShardedStrategy

CLIP = 0.05
"""Small enough to bite in every step."""
FP32 = {"compute": "fp32"}
SAMPLING = {"grid_images": 3, "sample_batch": 2, "cfg_scale": 1.5}
"""Three samples in batches of two: the second rank has nothing of its own to draw, and must take part."""


def record(job: dict[str, Any]) -> dict[str, Any]:
    """What `run` has stored."""
    return torch.load(Path(job["root"]) / f"{job['name']}.pt", weights_only=True)


def close(found: dict[str, Any], wanted: dict[str, Any], after: int = 0, atol: float = 1e-5) -> None:
    """Losses from step after + 1 on, and the weights at the end, averaged ones included; dtypes may differ."""
    assert found["losses"].keys() == {step for step in wanted["losses"] if step > after}
    for step, loss in found["losses"].items():
        assert abs(loss - wanted["losses"][step]) <= 1e-5, step
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name].to(value), value, atol=atol, rtol=1e-4, msg=name)


class Gradients(Callback):
    """Norm of every parameter's gradient over all ranks, before clipping, on both sides of the switch of stages. AdamW
    and the clipping hide a factor that all gradients have in common, such as a sum over ranks instead of a mean."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step not in (1, 2):
            return
        for name, parameter in pl_module.net.named_parameters():
            if parameter.grad is not None:
                self.seen[f"{trainer.global_step + 1}.{name}"] = float(whole(parameter.grad).norm())


class Ask(Callback):
    """Sends a signal to one rank, in the middle of the third step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


class NodeDies(Callback):
    """Under torchrun: kills the agent of one node and its process, without a warning, in the middle of a step. Once:
    it takes `flag` away, a file without which nothing happens."""

    def __init__(self, node: int, step: int, flag: str) -> None:
        self.node, self.step, self.flag = node, step, Path(flag)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.node_rank == self.node and trainer.global_step == self.step - 1 and self.flag.exists():
            self.flag.unlink()
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)


class Hold(Callback):
    """Lets no checkpoint be written before a step has ended, or the run; `seen` is what there was until then."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder, self.seen = step, folder, None
        self.ended = threading.Event()

    def on_train_start(self, trainer, pl_module) -> None:
        self.save, dcp.save = dcp.save, self.hold

    def hold(self, *arguments: Any, **named: Any) -> None:
        assert self.ended.wait(60)
        self.save(*arguments, **named)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step >= self.step and not self.ended.is_set():
            self.seen = {at.name: read_meta(at)["global_step"] for at in self.folder.glob("[!.]*.ckpt")}
            self.ended.set()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.ended.set()

    def teardown(self, trainer, pl_module, stage) -> None:
        dcp.save = self.save


class Dtypes(Callback):
    """Dtypes of parameters while their unit runs, of shards, of gradients and of moments."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}
        self.compute = dual_head.dual_nll

    def note(self, what: str, *tensors: torch.Tensor) -> None:
        self.seen.setdefault(what, set()).update(str(tensor.dtype) for tensor in tensors)

    def on_train_start(self, trainer, pl_module) -> None:
        net = pl_module.net
        for what, module in {
            "block": net.backbone.blocks[0], "vertical block": net.vertical.blocks[0],
            "embedding": net.backbone.code_embedding, "gate": net.dual_head.gate, "norm": net.backbone.norm,
        }.items():  # fmt: skip
            module.register_forward_pre_hook(lambda module, _, what=what: self.note(what, *module.parameters()))
        net.backbone.blocks[0].register_forward_hook(lambda module, _, out: self.note("activation", out))

        def dual_nll(h, v, gate, scale):
            self.note("heads", h.weight, v.weight)
            self.note("gate value", gate)
            return self.compute(h, v, gate, scale)

        dual_head.dual_nll = dual_nll

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for parameter in pl_module.net.parameters():
            assert isinstance(parameter, DTensor)
            self.note("shard", parameter)
            if parameter.grad is not None:
                self.note("gradient", parameter.grad)

    def on_train_end(self, trainer, pl_module) -> None:
        dual_head.dual_nll = self.compute
        self.note("moment", *(v for state in trainer.optimizers[0].state.values() for v in state.values()))


def strategy_of(name: str, options: dict[str, Any]) -> Any:
    return ShardedStrategy(**options) if name == "sharded" else name


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One fit. job: name, root (of its checkpoints and its record), shards, devices, strategy and its options, ..."""
    root = Path(job["root"])
    losses = Losses()
    dtypes = Dtypes()
    callbacks: list[Callback] = [losses, *([Ask(job["signal"]), StopOnSignal()] if "signal" in job else [])]
    gradients = Gradients()
    callbacks += [*([dtypes] if job.get("dtypes") else []), *([gradients] if job.get("gradients") else [])]
    if "hold" in job:
        callbacks.append(Hold(job["hold"], root))
    if job.get("save"):
        callbacks.append(ModelCheckpoint(root, filename="{step}", every_n_train_steps=job["save"], save_top_k=-1))
    module = make_module(
        backbone=BackboneConfig(options={**OPTIONS, **NO_DROPOUT, "dim": job.get("dim", 16)}),
        optimiser=OptimiserConfig(lr=1e-2, clip=CLIP, state=job.get("state", "fp32")),
        ema_decay=job.get("ema"),
        lora=LoraConfig(**job["lora"]) if "lora" in job else None,
        init_from=job.get("init_from"),
        validation=ValidationConfig(**job.get("validation", {})),
    )
    validating = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trained = fit(
        root, job["shards"], module, ckpt_path=job.get("ckpt"), devices=job["devices"],
        strategy=strategy_of(job["strategy"], job.get("options", {})), callbacks=callbacks,
        enable_checkpointing=bool(job.get("save")), max_steps=job.get("max_steps", 10),
        data={"validation_batch_size": 4, **job.get("data", {})}, **(validating if job.get("validation") else {}),
    )  # fmt: skip
    weights = {name: whole(value) for name, value in trained.state_dict().items()}
    results = {name: float(value) for name, value in trained.trainer.callback_metrics.items()}
    seen = {"losses": losses.seen, "dtypes": dtypes.seen, "gradients": gradients.seen}
    return {**seen, "weights": weights, "results": results}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_all(jobs: list[dict[str, Any]], devices: int = 2) -> None:
    """The fits one after the other, on the ranks of this process's group; the first one writes a record of each."""
    for job in jobs:
        try:
            record = run({**job, "devices": devices})
        except SystemExit as end:
            record = {"code": end.code}
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(record, Path(job["root"]) / f"{job['name']}.pt")


def go(jobs: list[dict[str, Any]], devices: int) -> None:
    """The same on `devices` ranks of their own: this file as a script."""
    launch(Path(__file__), json.dumps(jobs), devices, devices=devices)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(json.loads(sys.argv[1]), int(sys.argv[2]))
