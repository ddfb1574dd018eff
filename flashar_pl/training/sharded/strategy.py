"""Training on shards: FSDP2 behind Lightning's ModelParallelStrategy.

How a model is cut says `units.py`. A checkpoint is a directory: every device writes its shards, and any number of
devices reads them.

On resume the optimiser gets a state for exactly those parameters that have one in the checkpoint, whatever is frozen at
the time: deciding by `requires_grad` loses moments, or fails, when a run continues across the switch of stages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from flashar_pl.checkpoints.description import build_model, build_on_meta
from flashar_pl.checkpoints.initialise import InitReport, initialise
from flashar_pl.checkpoints.official import is_official_directory
from flashar_pl.checkpoints.runs import EMA_PREFIX, NET_PREFIX
from flashar_pl.checkpoints.sharded import SafeReader, read_meta, write_sharded
from flashar_pl.checkpoints.verify import offering
from flashar_pl.files import patiently
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import ADAPTER, LoraConfig, adapt, adaptation, adapted_layers
from flashar_pl.tensor_files import is_sharded
from flashar_pl.training.new_parts import new_parts
from flashar_pl.training.optim import set_rate
from flashar_pl.training.sharded.background import Background, host_copy
from flashar_pl.training.sharded.units import Compute, allocate, check_filled, local, recompute_blocks, shard

OPTIMISER = "optimiser."
"""Prefix of optimiser states in a sharded checkpoint: optimiser.NAME OF THE PARAMETER.NAME OF THE STATE."""


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser states cut over all devices (FSDP2). Use it with precision 32-true.

    Args:
        compute: dtype in which parameters are gathered and activations kept: bf16 or fp32. Shards, the reduction of
            gradients, moments and the gate are float32 either way.
        replicas: number of copies of the shards. 1 = one copy over all devices. With the number of nodes, parameters
            are gathered within a node, and only gradients travel between nodes; every device then holds more.
        recompute: keep only the inputs of blocks for the backward pass (activation checkpointing).
        offload: keep shards, gradients and moments in CPU memory, and run the optimiser there.
        background: write checkpoints while training goes on, from a copy of shards and moments in CPU memory. One is
            written at a time: the next one waits.
        timeout_minutes: how long a device waits for the others.
    """

    def __init__(
        self,
        compute: Compute = "bf16",
        replicas: int = 1,
        recompute: bool = False,
        offload: bool = False,
        background: bool = False,
        timeout_minutes: int = 30,
    ) -> None:
        if compute not in ("bf16", "fp32"):
            raise ValueError(f"strategy.compute is {compute!r}; expected bf16 or fp32.")
        if replicas < 1:
            raise ValueError(f"strategy.replicas is {replicas}; expected 1 or more.")
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        self.timeout = timedelta(minutes=timeout_minutes)
        super().__init__(process_group_backend=backend, timeout=self.timeout)
        self.compute, self.replicas, self.recompute, self.offload = compute, replicas, recompute, offload
        self.background = background
        self.saving: Background | None = None
        """What writes checkpoints during a training; None = they are written before it goes on."""
        self.mesh: DeviceMesh
        """What models are cut over: (shards,) or (replicas, shards)."""

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        if devices % self.replicas:
            raise ValueError(
                f"strategy.replicas is {self.replicas}, but there are {devices} devices; expected a divisor of it, "
                f"such as the number of nodes ({self.num_nodes})."
            )
        super().setup_environment()
        shape = (devices,) if self.replicas == 1 else (self.replicas, devices // self.replicas)
        names = ("replicas", "shards")[-len(shape) :]
        self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every device has samples of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: Trainer) -> None:
        if trainer.precision not in ("32-true", "32"):
            raise ValueError(
                f"trainer.precision is {trainer.precision} with a sharded strategy; expected 32-true. The dtype of "
                f"activations is strategy.compute (now {self.compute})."
            )
        evaluating = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        for loop in (*evaluating, trainer.predict_loop):
            loop.inference_mode = False  # gathered parameters would be inference tensors in the next training step
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Shards are where they belong since `build`."""

    # --- models -----------------------------------------------------------------------------------------------------

    def build(self, config: dict[str, Any], lora: LoraConfig | None = None, like: GridModel | None = None) -> GridModel:
        """The model of `build_model(config)`, float32, adapted as `lora` says, cut over the mesh, without weights.

        like: an equal model of this strategy, whose memory of what never trains is used again.
        """
        model = adapt(build_on_meta(config).float(), lora)
        if self.recompute:
            recompute_blocks(model)
        shard(model, self.mesh, self.compute, self.offload)
        allocate(model, self.root_device, self.offload, like)
        return model

    def start(self, model: GridModel, path: str | None) -> InitReport | None:
        """Give a built model its first weights: from `path`, as `initialise`, or random ones.

        An official directory is streamed, each device its own rows. Everything else is made or read by the first
        process and handed out.
        """
        if path is not None and is_official_directory(path):
            for part, whole in new_parts(model):
                self._hand_out(part, whole)
            for _, _, layer in adapted_layers(model):
                local(layer.lora_B[ADAPTER].weight.detach()).zero_()
            report: InitReport | None = initialise(model, path)
        else:
            made, report = self._made_by_first(lambda: _whole_model(model, path))
            self._hand_out(model, made)
        check_filled(model)
        return report

    def _hand_out(self, part: nn.Module, whole: nn.Module | None) -> None:
        """Give a sharded part the weights of a whole copy, which the first process has."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = whole.state_dict() if self.is_global_zero and whole is not None else {}
        set_model_state_dict(part, state, options=options)

    def _made_by_first(self, make: Callable[[], tuple[GridModel, Any]]) -> tuple[GridModel | None, Any]:
        """(result, report) on the first process, (None, report) on the others; a ValueError there is raised by all."""
        result, report, problem = None, None, None
        if self.is_global_zero:
            try:
                result, report = make()
            except ValueError as error:
                problem = str(error)
        report, problem = self.broadcast((report, problem))
        if problem is not None:
            raise ValueError(problem)
        return result, report

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Flat: "NAME OF THE PARAMETER.NAME OF THE STATE" -> tensor."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters().items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def _parameters(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return dict(self.lightning_module.named_parameters())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a directory of shards; the old one goes when the new one is whole."""
        tensors = checkpoint.pop("state_dict")
        for states in checkpoint.pop("optimizer_states", []):
            tensors |= {OPTIMISER + name: value for name, value in states.items()}
        path = Path(self.broadcast(filepath))
        if self.saving is None:
            patiently(lambda: write_sharded(path, tensors, checkpoint, self.is_global_zero))
            return
        self.saving.finish()
        group, rest = self.saving.group, copy.deepcopy(checkpoint)
        copies = {name: host_copy(tensor) for name, tensor in tensors.items()}

        def write() -> None:
            try:
                patiently(lambda: write_sharded(path, copies, rest, self.is_global_zero, group))
            finally:
                copies.clear()  # an error's frames hold this, and the run that it ends makes another copy

        self.saving.begin(write)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; not before the one that is being written is whole."""
        remove = partial(super().remove_checkpoint, filepath)
        remove() if self.saving is None else self.saving.begin(remove)

    def on_train_start(self) -> None:
        if self.background:
            self.saving = Background(self.timeout, self.root_device)

    def on_train_end(self) -> None:
        if self.saving is not None:
            self.saving.finish()

    def teardown(self) -> None:
        if self.saving is not None:
            self.saving.close()
        self.saving = None
        super().teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and moments into the shards; returns everything else. Runs no code from it."""
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            raise ValueError(
                f"{path} is no sharded checkpoint. It continues with the strategy that wrote it; to start a sharded "
                "run from its weights set model.init_from."
            )
        reader = SafeReader(path)
        stored = reader.names()
        state = self.lightning_module_state_dict()
        weights = {name for name in stored if not name.startswith(OPTIMISER)}
        odd = sorted(name for name in weights ^ state.keys() if not name.startswith(EMA_PREFIX))
        if odd:
            raise ValueError(
                f"{path} does not fit the model: {len(odd)} names are only in one of them ({', '.join(odd[:4])})."
            )
        new = state.keys() - weights  # averages, in a run that had none
        state = {name: value for name, value in state.items() if name in weights}
        for optimizer in self.optimizers:
            self._make_states(optimizer, [name for name in stored if name.startswith(OPTIMISER)])
            state |= {OPTIMISER + name: value for name, value in self.optimizer_state(optimizer).items()}
        with offering(path):
            reader.load(state)
        everything = self.lightning_module_state_dict()
        for name in new:
            everything[name].copy_(everything[NET_PREFIX + name.removeprefix(EMA_PREFIX)])
        return read_meta(path)

    def _make_states(self, optimizer: Optimizer, stored: list[str]) -> None:
        """Empty states for the parameters that have one in the checkpoint: by a step of rate 0 without gradient."""
        names = {name.removeprefix(OPTIMISER).rpartition(".")[0] for name in stored}
        optimizer.state.clear()
        for name, parameter in self._parameters().items():
            parameter.grad = torch.zeros_like(parameter) if name in names else None
        for group in optimizer.param_groups:
            set_rate(group, 0.0)  # the schedule sets it again when training starts
        if names:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _whole_model(like: GridModel, path: str | None) -> tuple[GridModel, InitReport | None]:
    model = adapt(build_model(like.config()).float(), adaptation(like))
    return model, None if path is None else initialise(model, path)
