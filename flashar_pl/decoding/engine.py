"""`Engine`: decodes batches with one model, and keeps the buffers and CUDA graphs that later batches can use again.

Shapes: B samples, R rows (B, or 2B with guidance), P prefix, H, W grid, N cells.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.backbones.base import Backbone
from flashar_pl.backbones.condition import Given, Prefix
from flashar_pl.decoding.build import PACKED_WIDTH
from flashar_pl.decoding.fused import FusedRecording, can_decode, decode_fused, refusal
from flashar_pl.decoding.graphs import Recording, record
from flashar_pl.decoding.loop import Buffers, Inputs, Progress, decode
from flashar_pl.decoding.lossless import Lossless
from flashar_pl.decoding.prefill import prefill_by_length
from flashar_pl.decoding.prepare import has_blocks
from flashar_pl.devices import available_memory
from flashar_pl.grid import DecodePlan, check_grid
from flashar_pl.layers.compiled import compiled_blocks, compiled_parts, first_line
from flashar_pl.layers.measured import wide_cache_pays
from flashar_pl.layers.packed import PackedLinear
from flashar_pl.layers.torch_private import compile_errors
from flashar_pl.layers.transformer import Attention, decode_mode
from flashar_pl.models.base import GridModel
from flashar_pl.models.raster import RasterAR
from flashar_pl.numerics import float64_device, full_precision, sample_seeds, uniforms
from flashar_pl.options import Coupling, Drafter, Runner, SamplingSettings
from flashar_pl.sampling import check_usable

PREFIX_BUCKET = 64
"""With CUDA graphs, prompts are left-padded to a multiple of this, so that prompts of many lengths share graphs."""
KEPT = 4
"""Shapes of batches whose graphs are kept, the latest used. Without graphs one: its buffers are soon made again."""
SPARE = 5
"""A cache in float32 adds half its size to what was planned: with so much memory for it, that is in the tenth that
`planner.room` leaves free."""


Recorded = Recording | FusedRecording
T = TypeVar("T")


class Engine:
    """A model ready to decode.

    Buffers and graphs are made at the first batch of a kind (plan, settings, batch size, dtype, prefix bucket) and used
    again by later ones: one batch at a time, from one thread. Between batches weights may change in place, as training
    does, and `DualHead.rules`; what is set for the whole of torch, such as TF32, stays in a graph as it was.

    Args:
        model: a FlashAR or RasterAR model, or a bare backbone (raster plan only).
        runner: see `EngineOptions`. `self.runner` is what auto became.
        drafter, window_rows: of lossless plans, see `EngineOptions`.

    Raises:
        ValueError: unknown runner; graphs without a CUDA device; compiled with packed weights; either with a sharded
            model.
    """

    def __init__(
        self, model: GridModel | Backbone, runner: Runner = "auto", drafter: Drafter = "above", window_rows: int = 2
    ) -> None:
        self.model = RasterAR(model) if isinstance(model, Backbone) else model
        self._fallback = runner == "auto"
        self.runner = _resolve(runner, self.model)
        self.prefix_bucket = PREFIX_BUCKET if self._recorded else 1
        self._speculation: tuple[Drafter, int] = (drafter, window_rows)
        self.forwards: list[int] = []
        """Of every sample that was drawn with a lossless plan, in their order: its forwards, the prefix's included."""
        self._kept: OrderedDict[Any, Buffers | Recorded | Lossless] = OrderedDict()
        self._parts: dict[str, Callable[..., Any]] = {}

    @property
    def _recorded(self) -> bool:
        """Whether batches are CUDA graphs."""
        return "graphs" in self.runner or (self.runner == "fused" and self.device.type == "cuda")

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    def generate(
        self,
        condition: Given,
        grid: tuple[int, int],
        plan: str = "diagonal",
        *,
        seeds: int | list[int] | Tensor | None = None,
        unconditional: Given | None = None,
        on_step: Callable[[Progress], object] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Codes (B, H, W) int64; see `flashar_pl.decoding.generate`. sampling: fields of `SamplingSettings`."""
        settings = SamplingSettings(**sampling)
        order = self.model.make_plan(plan, *check_grid(grid))
        if self.runner == "fused" and not can_decode(order):
            raise ValueError(f"runner is fused, and its kernels know no {plan} plan; use eager, or graphs on CUDA.")
        if settings.coupling != "independent":
            self._check_coupling(order)
        backbone, device = self.model.backbone, self.device
        wanted = backbone.check_condition(condition).to(device)
        listed = sample_seeds(seeds, len(wanted))
        if not listed:
            raise ValueError("condition holds no samples; expected at least one.")
        away = None if unconditional is None else backbone.check_condition(unconditional, len(listed)).to(device)
        show = on_step or (lambda progress: None)
        # a caller's inference mode must not reach the buffers: later batches could not write to them
        with torch.inference_mode(False), torch.no_grad(), decode_mode(self.model), full_precision(device.type):
            if self.model.own_decoding:
                with self._blocks():
                    return self.model.draw(
                        wanted, order, settings, listed, away, lambda done, drawn: show(Progress(order, done, drawn))
                    )
            if settings.guided:
                wanted = backbone.with_unconditional(wanted, away)
            prefix = self.model.prefix(wanted)
            if backbone.conditioning.kind == "prompt":  # of many lengths
                prefix = pad_prefix(prefix, self.prefix_bucket)
            rope = self.model.rope(order, prefix, settings.guided)
            noise = uniforms(listed, order.n_cells)[:, order.order].to(float64_device(device))  # (B, N)
            inputs = Inputs(prefix, rope, noise)
            buffers = self._run(order, settings, inputs, show)
        check_usable(buffers.broken, prefix.x.dtype)
        return Progress(order, order.n_steps, buffers.drawn).codes()

    def _check_coupling(self, plan: DecodePlan) -> None:
        """ValueError unless `plan` draws several codes a step, by the common loop."""
        why = None
        if self.model.own_decoding or all(len(cells) == 1 for cells in plan.cells_of_step):
            why = f"a {self.model.method} model with the {plan.name} plan does not draw several codes at once"
        elif self.runner == "fused":
            why = "the kernels of runner fused draw each code by itself: use eager, or graphs on CUDA"
        if why is not None:
            raise ValueError(f"coupling is systematic, and {why}.")

    def _run(
        self, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs, on_step: Callable[[Progress], object]
    ) -> Buffers:
        """The batch decoded, in buffers that the next batch overwrites."""
        key: tuple[Any, ...] = (plan, settings, inputs.shapes(), self.model.dual_head.rules)
        if self._recorded:
            key = (*key, tuple(parameter.data_ptr() for parameter in self.model.parameters()))
        with self._blocks():
            if plan.name == "lossless":
                graph = (lambda run: self._recording(partial(record, self.device, run))) if self._recorded else None
                make = partial(Lossless, self.model, plan, settings, inputs, *self._speculation, graph)
                found = self._keep(key, make)
                assert isinstance(found, Lossless)
                buffers = found.run(inputs, on_step)
                self.forwards += found.forwards.tolist()
                return buffers
            if self._recorded:
                recording = self._keep(key, partial(self._record, plan, settings, inputs))
                if isinstance(recording, Recorded):
                    return recording.replay(inputs, on_step)
            buffers = self._keep(
                key, lambda: Buffers.allocate(self.model, plan, inputs, self._cache_dtype(plan, inputs))
            )
            assert isinstance(buffers, Buffers)
            loop: Callable[..., Iterator[int]] = decode_fused if self.runner == "fused" else decode
            prompts = self.model.backbone.conditioning.kind == "prompt" and self.device.type == "cpu"
            if prompts and loop is decode and not self.model.sharded:  # ranks of a sharded one forward in step
                loop = partial(decode, prefill=prefill_by_length)
            for t in loop(self.model, plan, settings, inputs, buffers):
                on_step(Progress(plan, t + 1, buffers.drawn))
        return buffers

    def _cache_dtype(self, plan: DecodePlan, inputs: Inputs) -> torch.dtype:
        """The model's; on a CPU float32 where its attention is measured to be the faster one and memory suffices."""
        x, spec = inputs.prefix.x, self.model.cache_spec()
        attention = next((module for module in self.model.modules() if isinstance(module, Attention)), None)
        if x.device.type != "cpu" or x.dtype.itemsize > 2 or x.shape[2] < PACKED_WIDTH or attention is None:
            return x.dtype
        length = x.shape[1] + plan.n_inputs
        size = 8 * spec.n_layer * len(x) * spec.n_kv_head * length * spec.head_dim  # of keys and values in float32
        n, heads = max(1, round(plan.n_slots / plan.n_steps)), attention.config.n_head
        wide = self.runner != "fused" and SPARE * size < available_memory(x.device)
        asked = heads, spec.n_kv_head, spec.head_dim, n, max(1, length // 2), x.dtype, len(x)
        return torch.float32 if wide and wide_cache_pays(*asked) else x.dtype

    def _record(self, plan: DecodePlan, settings: SamplingSettings, inputs: Inputs) -> Recorded | Buffers:
        """The graphs of a batch like `inputs`; where `auto` chose graphs and they fail, plain buffers from now on."""
        kind: Callable[..., Recorded] = FusedRecording if self.runner == "fused" else Recording
        made = self._recording(lambda: kind(self.model, plan, settings, inputs))
        return Buffers.allocate(self.model, plan, inputs) if made is None else made

    def _recording(self, make: Callable[[], T]) -> T | None:
        """What `make` records; None, and the runner is eager from now on, where `auto` chose graphs and they fail."""
        try:
            return make()
        except RuntimeError as error:
            if isinstance(error, (torch.OutOfMemoryError, *compile_errors())):
                raise
            # a capture that ends because of an error says no more than that, and has the error as its context
            first = error.__context__ or error
            cause = next(iter(str(first).splitlines()), type(first).__name__)
            if not self._fallback:
                raise ValueError(f"CUDA graphs could not be recorded: {cause}. Use runner eager.") from error
            warnings.warn(f"CUDA graphs could not be recorded, decoding goes on without: {cause}", stacklevel=2)
            self.runner = "eager"
            return None

    def _keep(self, key: Any, make: Callable[[], Buffers | Recorded | Lossless]) -> Any:
        """The entry `key`, made if there is none. The one used least recently makes room before that.

        Where the device's memory does not suffice, all others do; not among devices that share the model: what one of
        them computes again, the others would have to.
        """
        if key not in self._kept:
            while len(self._kept) >= (KEPT if self._recorded else 1):
                self._kept.popitem(last=False)
            try:
                self._kept[key] = make()
            except torch.OutOfMemoryError:
                if not self._kept or self.model.shared:
                    raise
                self._kept.clear()
        if key not in self._kept:  # again outside of the handler, whose error holds what was allocated
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    @contextmanager
    def _blocks(self) -> Iterator[None]:
        """The model's blocks compiled, if the runner says so."""
        if "compiled" not in self.runner:
            yield
            return
        self._parts = self._parts or compiled_parts(dynamic=True)
        try:
            with compiled_blocks(self.model, self._parts):
                yield
        except compile_errors() as error:
            cause = first_line(error)
            raise ValueError(f"torch.compile failed: {cause}. Use runner eager, or graphs on CUDA.") from error


def generate(
    model: GridModel | Backbone,
    condition: Given,
    grid: tuple[int, int],
    plan: str = "diagonal",
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seeds: int | list[int] | Tensor | None = None,
    unconditional: Given | None = None,
    on_step: Callable[[Progress], object] | None = None,
    coupling: Coupling = "independent",
) -> Tensor:
    """Sample codes (B, H, W) int64 for the B samples of `condition`, with the eager runner. For many batches: `Engine`.

    Args:
        model: a FlashAR or RasterAR model, or a bare backbone (raster plan only).
        condition: class ids (B,) int64, TextFeatures, or a list of id tensors, as the backbone expects.
        grid: (H, W).
        plan: "diagonal" (H + W - 1 steps), "raster" (H * W steps, horizontal head only), or "lossless", the raster
            plan's codes in fewer forwards.
        cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, coupling: see `SamplingSettings`.
        seeds: None = random, an int s = sample i uses s + i, or B ints. Equal seed and batch shape give equal codes.
        unconditional: None = the model's own null condition.
        on_step: called after every step with the codes so far, see `Progress`; what it raises ends the decoding.

    Raises:
        ValueError: a setting out of range, a condition of the wrong kind, a plan the model cannot run, or a model
            whose logits are NaN or infinite.
    """
    settings = SamplingSettings(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, coupling)
    return Engine(model, "eager").generate(
        condition, grid, plan, seeds=seeds, unconditional=unconditional, on_step=on_step, **asdict(settings)
    )


def pad_prefix(prefix: Prefix, bucket: int) -> Prefix:
    """The prefix, left-padded to a multiple of `bucket` positions. Without padding in any row it has no mask."""
    missing = -len(prefix) % bucket
    if not missing:
        return prefix
    valid = prefix.mask
    if valid is None:
        valid = torch.ones(prefix.x.shape[:2], dtype=torch.bool, device=prefix.x.device)
    x, valid = F.pad(prefix.x, (0, 0, missing, 0)), F.pad(valid, (missing, 0), value=False)
    return replace(prefix, x=x, mask=valid)


def _resolve(runner: str, model: GridModel) -> str:
    """The runner that `auto` stands for, or `runner` if the model can use it."""
    if runner not in get_args(Runner):
        raise ValueError(f"runner is {runner!r}; expected one of {', '.join(get_args(Runner))}.")
    device, sharded = model.device, model.sharded
    if runner == "auto":
        return "graphs" if device.type == "cuda" and not sharded and not model.own_decoding else "eager"
    if "graphs" in runner and model.own_decoding:
        others = "eager or compiled" if has_blocks(model) else "eager"
        raise ValueError(f"runner is {runner}, and a {model.method} model is not recorded in graphs; use {others}.")
    if "compiled" in runner and not has_blocks(model):
        raise ValueError(f"runner is {runner}, and nothing of a {model.method} model is compiled; use eager.")
    if "graphs" in runner and device.type != "cuda":
        raise ValueError(
            f"runner is {runner}, and the model is on {device}; CUDA graphs need a CUDA device: use eager."
        )
    if "compiled" in runner and any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(f"runner is {runner}, and the weights are packed, which torch.compile cannot read: use eager.")
    if runner != "eager" and sharded:
        raise ValueError(f"runner is {runner}, and the model is sharded; expected eager.")
    if runner == "fused" and (why := refusal(model)) is not None:
        raise ValueError(f"runner is fused, and {why}; use {'graphs' if device.type == 'cuda' else 'eager'}.")
    return runner
