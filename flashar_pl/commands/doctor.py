"""`flashar doctor`: what this machine has, and whether every way of decoding and the training loss compute right on it.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from flashar_pl.console import Missed, first_line, progress_bar, table, versions
from flashar_pl.files import require_new, write_json
from flashar_pl.options import ComputeOptions, Dtype, PresetOptions, Runner, WayOptions, WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flashar_pl.backbones.condition import Condition
    from flashar_pl.benchmarking.subjects import Subject
    from flashar_pl.decoding import Engine
    from flashar_pl.models import GridModel

PACKAGES = {
    "lightning": "training", "webdataset": "shards", "torchmetrics": "FID of a validation", "tensorboard": "curves",
    "matplotlib": "plots and the demo: pip install 'flashar-pl[demo]'",
    "scikit-learn": "the demo: pip install 'flashar-pl[demo]'",
    "torchao": "8-bit moments: pip install 'flashar-pl[large]'",
    "peft": "LoRA: pip install 'flashar-pl[lora]'",
    "tiktoken": "prompts of tokens: pip install 'flashar-pl[emu]'",
    "transformers": "captions, GenEval: pip install 'flashar-pl[emu]'",
    "uvicorn": "flashar serve: pip install 'flashar-pl[serve]'",
}  # fmt: skip
"""Distributions, and what for."""
FAILURES = (ValueError, RuntimeError)
"""What a check may end with: settings that do not go together, and kernels, compilers and memory that fail."""
SAMPLES = 2
"""Images of a check."""
LIMITS = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.005}
"""Largest `flashar_pl.decoding.parity.misplacement` of a cell."""
LOSS_LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
"""Largest relative difference of the loss, or of the gradient of a parameter."""


@dataclass(frozen=True)
class Check:
    """One thing that was computed in two ways."""

    model: str
    dtype: Dtype
    what: str
    limit: float
    difference: float | None = None
    """None = it could not run, or is not finite; `remark` says which."""
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a difference within its limit."""
        return self.difference is not None and self.difference <= self.limit


def doctor(
    model: PresetOptions = PresetOptions(),
    ways: WayOptions = WayOptions(),
    compute: ComputeOptions = ComputeOptions(),
    *,
    out: str | None = None,
) -> dict[str, Any]:
    """Say what this machine has, and check that every way of decoding computes the same as the plain model on it.

    Codes are drawn with the cache, and the whole model is computed once more from them without it: the random number
    of every cell must lie in the interval that its code has in the CDF found there. "difference" is the largest
    distance. Tiny models with random weights stand for all families, and their training loss and its gradients are
    compared with a plain implementation. A checkpoint or a preset is checked instead if given; all its logits are in
    memory then. Packed, int8 and fp8 weights are also compared with plain ones on the codes that were drawn: their KL
    divergence in nats per image, and how often the likeliest code is the same. Without --dtype both float32 and
    bfloat16 are checked, without --runners eager and, on a GPU, graphs. Exit code 1 if a check fails.

    Example:
        flashar doctor --device cuda --runners eager,graphs,compiled
        flashar doctor --checkpoint runs/demo/flashar/checkpoints/last.ckpt --weight-formats plain,packed,int8,fp8

    Args:
        out: also write the result to this new JSON file.
    """
    from flashar_pl.devices import find_device

    place, given = find_device(compute.device), (model.preset, model.checkpoint) != (None, None)
    if model != PresetOptions() and not given:
        raise ValueError("the tiny models have a grid and a branch of their own; give a checkpoint or a preset.")
    if out is not None:
        require_new(out, "result")
    dtypes: list[Dtype] = ["fp32", "bf16"] if compute.dtype is None else [compute.dtype]
    variants = {dtype: variants_of(ways, place, dtype) for dtype in dtypes}
    machine = facts(place)
    print(table(("", "found"), [[key, value] for key, value in machine.items()]) + "\n", flush=True)
    names = [str(model.checkpoint or model.preset)] if given else tiny_names()
    checks: list[Check] = []
    with progress_bar(len(names) * sum(len(each) + 1 for each in variants.values()), "checks") as advance:
        for name in names:
            for dtype in dtypes:
                checks += list(check(name, model if given else None, place, dtype, variants[dtype], advance))
    print(described(checks))
    found = [{**asdict(each), "passed": each.passed} for each in checks]
    result = {"machine": machine, "checks": found, "versions": versions()}
    if out is not None:
        write_json(out, result)
    if failed := [f"{check.model}, {check.dtype}: {check.what}" for check in checks if not check.passed]:
        raise Missed(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}.")
    print(f"All {len(checks)} checks passed on {place}.")
    return result


def facts(place: torch.device) -> dict[str, str]:
    """What there is: the device, and packages with their versions or what their absence costs."""
    import torch

    from flashar_pl.devices import device_name
    from flashar_pl.layers.packed import unsupported
    from flashar_pl.metrics.inception import side_directory

    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(place)}
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        found["GPU memory"] = f"{properties.total_memory / 1e9:.1f} GB, {torch.cuda.device_count()} device(s)"
        found["compute capability"] = f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "no"
    else:
        missing = unsupported(torch.bfloat16)
        found["cores"] = f"{os.cpu_count()}, threads of torch: {torch.get_num_threads()}"
        found["packed bfloat16 weights"] = "yes" if missing is None else f"no: {missing}"
    for name, purpose in PACKAGES.items():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = f"missing, needed for {purpose}"
    has = (side_directory() / "torch_fidelity").is_dir()
    found["torch-fidelity"] = "beside the environment" if has else "not beside the environment; see docs/evaluation.md"
    return found


def described(checks: list[Check]) -> str:
    """The checks as a table."""
    lines = []
    for each in checks:
        difference = "-" if each.difference is None else f"{each.difference:.1e}"
        verdict = " ".join(filter(None, ("passed" if each.passed else "FAILED", each.remark)))
        lines.append([each.model, each.dtype, each.what, difference, f"{each.limit:g}", verdict])
    return table(("model", "dtype", "check", "difference", "limit", ""), lines)


def variants_of(ways: WayOptions, place: torch.device, dtype: Dtype) -> list[tuple[Runner, WeightFormat]]:
    """What is checked in one dtype; "auto" formats leave out what this machine or a runner does not have."""
    from flashar_pl.decoding.build import packs
    from flashar_pl.layers.packed import unsupported
    from flashar_pl.numerics import dtype_from_name

    cuda, auto = place.type == "cuda", ways.weight_formats == "auto"
    runners = ("eager,graphs" if cuda else "eager") if ways.runners == "auto" else ways.runners
    formats = ("plain" if cuda else "plain,packed") if auto else ways.weight_formats
    packed = unsupported(dtype_from_name(dtype)) is None
    found = WayOptions(runners, formats).each()
    return [(r, form) for r, form in found if not auto or form == "plain" or (packed and packs(r))]


def tiny_names() -> list[str]:
    """The families that have a tiny model."""
    from flashar_pl.backbones.registry import examples

    return list(examples())


def lively(model: GridModel) -> GridModel:
    """The model with weights so large that every position matters: a wrong cache must change what is drawn."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embedding" in name else 1.5 * parameter.shape[1] ** -0.5)
    return model


def check(
    name: str,
    asked: PresetOptions | None,
    place: torch.device,
    dtype: Dtype,
    variants: list[tuple[Runner, WeightFormat]],
    advance: Callable[[int], Any],
) -> Iterator[Check]:
    """All checks of one model in one dtype. asked: a checkpoint or preset; None = the tiny model of a family."""
    from flashar_pl.backbones.registry import examples
    from flashar_pl.benchmarking.subjects import Subject
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.prepare import prepare
    from flashar_pl.numerics import dtype_from_name
    from flashar_pl.planner.sizes import model_sizes

    def tried(what: str, limit: float, measure: Callable[[], tuple[float, str]]) -> Check:
        try:
            difference, remark = measure()
        except FAILURES as error:
            return Check(name, dtype, what, limit, None, first_line(error))
        if not math.isfinite(difference):
            return Check(name, dtype, what, limit, None, f"the difference is {difference} {remark}".strip())
        return Check(name, dtype, what, limit, difference, remark)

    if asked is None:
        subject = Subject(model_sizes({"backbone": examples()[name]}), (6, 5))  # no square
    else:
        subject = Subject.of(asked, place, dtype)
    try:
        plain = subject.loaded or lively(subject.model(place, dtype_from_name(dtype)))
    except FAILURES as error:
        yield Check(name, dtype, "loading", LIMITS[dtype], None, first_line(error))
        return
    plans = ("diagonal", "raster") if plain.dual_head.vertical is not None else ("raster",)
    scales = (1.0,) if plain.null_style == "released" else (1.0, 2.0)  # their positions depend on both rows of a pair
    for runner, weights in variants:
        what = f"{runner}, {weights} weights"
        try:
            engine = Engine(prepare(plain, weights), runner)
        except FAILURES as error:
            yield Check(name, dtype, what, LIMITS[dtype], None, first_line(error))
        else:
            for plan, scale in ((plan, scale) for plan in plans for scale in scales):
                label = f"{plan}, {'guided, ' if scale != 1 else ''}{what}"
                yield tried(label, LIMITS[dtype], lambda p=plan, s=scale: decoded(engine, subject, p, s, plain))  # type: ignore[misc] # noqa: B023
        advance(1)
    if asked is None:
        label = "training loss and gradients"
        yield tried(label, LOSS_LIMITS[dtype], lambda: (loss_difference(subject, dtype, place), ""))
    advance(1)


def decoded(engine: Engine, subject: Subject, plan: str, scale: float, plain: GridModel) -> tuple[float, str]:
    """The largest misplacement of images that are drawn now; and what other weights than the plain ones change."""
    from flashar_pl.decoding.parity import misplacement

    condition, nulls = subject.condition(SAMPLES, scale != 1)
    if isinstance(condition, list):  # prompts of several lengths: padded rows
        condition = type(condition)(row[: max(1, len(row) - 3 * i)] for i, row in enumerate(condition))
    codes = engine.generate(condition, subject.grid, plan, cfg_scale=scale, seeds=0, unconditional=nulls)
    worst = float(misplacement(engine.model, codes, condition, plan, scale, 0, nulls).max())
    same = engine.model is plain or scale != 1
    return worst, "" if same else changed(engine.model, plain, codes, condition, plan)


def changed(model: GridModel, plain: GridModel, codes: Tensor, condition: Condition, plan: str) -> str:
    """KL divergence from the plain weights, and agreement with them, on codes (B, H, W), teacher-forced."""
    import torch

    from flashar_pl.layers.transformer import decode_mode

    logs = []
    for each in (model, plain):
        with torch.no_grad(), decode_mode(each):
            order = each.make_plan(plan, *codes.shape[1:])
            logs.append(each(codes, condition.to(each.device), order).fused.log_softmax(-1))  # (B, H, W, V)
    lost = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).double().sum() / len(codes)
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()
    return f"{float(lost):.2g} nats an image from plain, likeliest code the same in {float(same):.1%}"


def loss_difference(subject: Subject, dtype: Dtype, place: torch.device) -> float:
    """The loss and all its gradients against the plain loss, from float32 weights under autocast as in training."""
    import torch

    from flashar_pl.benchmarking.plain_loss import plain_loss
    from flashar_pl.numerics import dtype_from_name

    model = lively(subject.model(place, torch.float32)).requires_grad_(True)
    plan = model.make_plan(None, *subject.grid)
    condition = subject.condition(SAMPLES, False)[0].to(place)
    codes = torch.randint(0, model.backbone.vocabulary, (SAMPLES, *subject.grid), device=place)
    found = []
    for loss in (lambda: model.loss(codes, condition, plan)["loss"], lambda: plain_loss(model, codes, condition, plan)):
        model.zero_grad()
        with torch.autocast(place.type, dtype_from_name(dtype), enabled=dtype != "fp32"):
            value = loss()
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
