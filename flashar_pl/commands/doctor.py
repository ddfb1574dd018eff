"""`flashar doctor`: what this machine has, and whether every way of decoding and the training loss compute right on it.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.benchmarking.table import markdown
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.console import Missed, first_line, progress_bar, versions
from flashar_pl.decoding.build import parse_variants
from flashar_pl.devices import find_device
from flashar_pl.files import require_new, write_json
from flashar_pl.options import DeviceOptions, Dtype, ModelOptions, Runner, WeightFormat, parse_grid

if TYPE_CHECKING:
    import torch

    from flashar_pl.models import GridModel
    from flashar_pl.planner.sizes import ModelSizes

PACKAGES = {
    "lightning": "training", "webdataset": "shards", "tensorboard": "curves",
    "matplotlib": "plots and the demo: pip install 'flashar-pl[demo]'",
    "scikit-learn": "the demo: pip install 'flashar-pl[demo]'",
    "torchao": "int8, fp8, 8-bit moments: pip install 'flashar-pl[large]'",
    "peft": "LoRA: pip install 'flashar-pl[lora]'",
    "tiktoken": "prompts of tokens: pip install 'flashar-pl[emu]'",
    "transformers": "captions, GenEval: pip install 'flashar-pl[emu]'",
}  # fmt: skip
"""Distributions, and what for."""
FAILURES = (ValueError, RuntimeError)
"""What a check may end with: settings that do not go together, and kernels, compilers and memory that fail."""
LIMITS = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.005}
"""Largest `flashar_pl.decoding.parity.misplacement` of a cell."""
LOSS_LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
"""Largest relative difference of the loss, or of the gradient of a parameter."""


@dataclass(frozen=True)
class Check:
    """One thing that was computed in two ways."""

    model: str
    dtype: str
    what: str
    difference: float | None
    """None = it could not run; `remark` says why."""
    limit: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit; NaN is not."""
        return self.difference is not None and self.difference <= self.limit


@dataclass(frozen=True)
class Subject:
    """A model that is checked."""

    name: str
    sizes: ModelSizes
    make: Callable[[Dtype], GridModel]
    grid: tuple[int, int]
    trains: bool
    """Whether the training loss is checked as well."""
    guided: bool = True
    """Whether decoding is checked with guidance."""


def doctor(
    *,
    checkpoint: str | None = None,
    preset: str | None = None,
    device: str = "auto",
    dtypes: str = "fp32,bf16",
    runner: str = "auto",
    weight_format: str = "auto",
    grid: str | None = None,
    samples: int = 2,
    out: str | None = None,
) -> dict[str, Any]:
    """Say what this machine has, and check that every way of decoding computes the same as the plain model on it.

    Codes are drawn with the cache, and the whole model is computed once more from them without it: the random number
    of every cell must lie in the interval that its code has in the CDF found there. "difference" is the largest
    distance. Two tiny models with random weights stand for both families, and their training loss and its gradients
    are compared with a plain implementation. A checkpoint or a preset is checked instead if given; all its logits are
    in memory then. Exit code 1 if a check fails.

    Example:
        flashar doctor --device cuda --runner eager,graphs,compiled

    Args:
        checkpoint: a checkpoint of any kind, whose decoding is checked.
        preset: published size with random weights: llamagen-b, -l, -xl, -xxl, -3b, -xl-t2i, or emu35-34b.
        device: auto, cpu, cuda or cuda:N.
        dtypes: fp32, bf16, fp16, separated by commas.
        runner: eager, compiled, graphs, compiled-graphs, separated by commas; auto is eager, and graphs on a GPU.
        weight_format: plain, packed, int8, fp8, separated by commas; auto is plain, and packed on a CPU that has it.
        grid: code grid HEIGHTxWIDTH. Default: the checkpoint's own; of a preset 16x16 (emu35 32x32).
        samples: images decoded at once.
        out: also write the result to this new JSON file.
    """
    from flashar_pl.numerics import dtype_from_name

    place = find_device(device)
    if checkpoint is not None and preset is not None:
        raise ValueError(f"checkpoint is {checkpoint!r} and preset {preset!r}; expected one of them, or neither.")
    if grid is not None and checkpoint is None and preset is None:
        raise ValueError(f"grid is {grid}, and the tiny models have their own; give a checkpoint or a preset.")
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected 1 or more.")
    if out is not None:
        require_new(out, "result")
    names: list[Any] = list(dict.fromkeys(word.strip() for word in dtypes.split(",")))
    for name in names:
        dtype_from_name(name)
    variants = {name: _variants(runner, weight_format, place, name) for name in names}
    machine = facts(place)
    print(markdown(("", "found"), [[key, value] for key, value in machine.items()]) + "\n", flush=True)
    checks: list[Check] = []
    subjects = list(_subjects(checkpoint, preset, grid, place, names))
    with progress_bar(len(subjects) * sum(len(each) + 1 for each in variants.values()), "checks") as advance:
        for subject in subjects:
            for name in names:
                checks += list(_check(subject, name, variants[name], samples, place, advance))
    print(table(checks))
    result = {
        "machine": machine,
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "versions": versions(),
    }
    if out is not None:
        write_json(out, result)
    failed = [f"{check.model}, {check.dtype}: {check.what}" for check in checks if not check.passed]
    if failed:
        raise Missed(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}.")
    print(f"All {len(checks)} checks passed on {place}.")
    return result


def facts(place: torch.device) -> dict[str, str]:
    """What there is: the device, and packages with their versions or what their absence costs."""
    import torch

    from flashar_pl.benchmarking.rows import device_name
    from flashar_pl.layers.packed import unsupported
    from flashar_pl.metrics.inception import side_directory

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{place}: {device_name(place)}",
    }
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


def table(checks: list[Check]) -> str:
    """The checks in Markdown."""
    lines = [
        [
            check.model,
            check.dtype,
            check.what,
            "-" if check.difference is None else f"{check.difference:.1e}",
            f"{check.limit:g}",
            "passed" if check.passed else f"FAILED {check.remark}".rstrip(),
        ]
        for check in checks
    ]
    return markdown(("model", "dtype", "check", "difference", "limit", ""), lines)


def _subjects(
    checkpoint: str | None, preset: str | None, grid: str | None, place: torch.device, dtypes: list[Dtype]
) -> Iterator[Subject]:
    """What is to be checked."""
    from flashar_pl.backbones import examples
    from flashar_pl.benchmarking.rows import synthetic_model
    from flashar_pl.numerics import dtype_from_name
    from flashar_pl.planner import model_sizes

    if checkpoint is not None:
        source = open_checkpoint(ModelOptions(checkpoint, grid=grid), DeviceOptions(str(place), dtypes[0]))
        loaded = {dtypes[0]: source.model}

        def load(dtype: Dtype) -> GridModel:
            model = loaded.pop(dtype, None)  # held no longer than it is checked
            return (
                open_checkpoint(ModelOptions(checkpoint, grid=grid), DeviceOptions(str(place), dtype)).model
                if model is None
                else model
            )

        config, shape = source.model.config(), source.need_grid()
        guided = not getattr(getattr(source.model, "compatibility", None), "pair_padding", False)
        yield Subject(Path(checkpoint).name, model_sizes(config), load, shape, False, guided)
        return
    configs = (
        {preset: {"preset": preset}}
        if preset is not None
        else {f"tiny {kind}": config for kind, config in examples().items()}
    )
    for name, backbone in configs.items():
        sizes = model_sizes({"kind": "flashar", "backbone": backbone})
        shape = parse_grid(grid) or (sizes.usual_grid if preset is not None else (6, 5))

        def make(dtype: Dtype, sizes: ModelSizes = sizes) -> GridModel:
            return _lively(synthetic_model(sizes, place, dtype_from_name(dtype)))

        yield Subject(str(name), sizes, make, shape, preset is None)


def _variants(runner: str, weight_format: str, place: torch.device, dtype: Dtype) -> list[tuple[Runner, WeightFormat]]:
    """What is checked in one dtype. "auto" formats leave out what this machine or a runner does not have."""
    from flashar_pl.layers.packed import unsupported
    from flashar_pl.numerics import dtype_from_name

    cuda, auto = place.type == "cuda", weight_format == "auto"
    runners = ("eager,graphs" if cuda else "eager") if runner == "auto" else runner
    found = parse_variants(runners, ("plain" if cuda else "plain,packed") if auto else weight_format)
    packs = unsupported(dtype_from_name(dtype)) is None
    return [(r, form) for r, form in found if not auto or form == "plain" or (packs and "compiled" not in r)]


def _lively(model: GridModel) -> GridModel:
    """The model with weights so large that every position matters: a wrong cache must change what is drawn."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embedding" in name else 1.5 * parameter.shape[1] ** -0.5)
    return model


def _check(
    subject: Subject,
    dtype: Dtype,
    variants: list[tuple[Runner, WeightFormat]],
    samples: int,
    place: torch.device,
    advance: Callable[[int], Any],
) -> Iterator[Check]:
    """All checks of one model in one dtype."""
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.prepare import prepare

    try:
        model = subject.make(dtype)
    except FAILURES as error:
        yield Check(subject.name, dtype, "loading", None, LIMITS[dtype], first_line(error))
        return
    plans = ("diagonal", "raster") if model.dual_head.vertical is not None else ("raster",)
    for runner, weights in variants:
        what = f"{runner}, {weights} weights"
        try:
            engine = Engine(prepare(model, weights), runner)
        except FAILURES as error:
            yield Check(subject.name, dtype, what, None, LIMITS[dtype], first_line(error))
            advance(1)
            continue
        for plan in plans:
            for scale in (1.0, 2.0) if subject.guided else (1.0,):
                label = f"{plan}, {'guided, ' if scale != 1 else ''}{what}"
                try:
                    worst = _worst(engine, subject, plan, scale, samples)
                    yield Check(subject.name, dtype, label, worst, LIMITS[dtype])
                except FAILURES as error:
                    yield Check(subject.name, dtype, label, None, LIMITS[dtype], first_line(error))
        advance(1)
    if subject.trains:
        difference, remark = None, ""
        try:
            difference = _loss_difference(subject, dtype, samples, place)
        except FAILURES as error:
            remark = first_line(error)
        yield Check(subject.name, dtype, "training loss and gradients", difference, LOSS_LIMITS[dtype], remark)
    advance(1)


def _worst(engine: Any, subject: Subject, plan: str, scale: float, samples: int) -> float:
    from flashar_pl.benchmarking.rows import synthetic_condition
    from flashar_pl.decoding.parity import misplacement

    condition, unconditional = synthetic_condition(subject.sizes, samples, scale != 1)
    if isinstance(condition, list):  # prompts of several lengths: padded rows
        condition = type(condition)(row[: max(1, len(row) - 3 * i)] for i, row in enumerate(condition))
    codes = engine.generate(condition, subject.grid, plan, scale, seeds=0, unconditional=unconditional)
    return float(misplacement(engine.model, codes, condition, plan, scale, 0, unconditional).max())


def _loss_difference(subject: Subject, dtype: Dtype, samples: int, place: torch.device) -> float:
    """The loss and all its gradients against the plain loss, from float32 weights under autocast as in training."""
    import torch

    from flashar_pl.benchmarking.plain_loss import plain_loss
    from flashar_pl.benchmarking.rows import synthetic_condition
    from flashar_pl.numerics import dtype_from_name

    model = subject.make("fp32").requires_grad_(True)
    plan = model.default_plan(*subject.grid)
    condition = synthetic_condition(subject.sizes, samples, False)[0].to(place)
    codes = torch.randint(0, model.backbone.vocabulary, (samples, *subject.grid), device=place)
    found = []
    for loss in (lambda: model.loss(codes, condition, plan)["loss"], lambda: plain_loss(model, codes, condition, plan)):
        model.zero_grad()
        with torch.autocast(place.type, dtype_from_name(dtype), enabled=dtype != "fp32"):
            value = loss()
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
