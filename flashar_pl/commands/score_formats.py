"""`flashar score formats`: what packed, int8 and fp8 weights change, in likelihood, codes and memory.

Shapes: B images of a batch, H x W grid, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from flashar_pl.benchmarking.table import markdown
from flashar_pl.checkpoints.opening import check_plan, open_checkpoint
from flashar_pl.commands.score import caption_encoder, check_data, held_out
from flashar_pl.console import progress_bar, versions
from flashar_pl.devices import find_device
from flashar_pl.files import require_new, write_json
from flashar_pl.options import DeviceOptions, Dtype, ModelOptions, Plan, WeightFormat, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.condition import Batch
    from flashar_pl.models import GridModel


@dataclass
class Behaviour:
    """What one format of the weights makes of the images, one entry per batch."""

    nll: list[Tensor] = field(default_factory=list)
    """(B,) nats per image, teacher-forced."""
    first: list[Tensor] = field(default_factory=list)
    """(B, H, W) most likely codes, teacher-forced."""
    greedy: list[Tensor] = field(default_factory=list)
    """(B, H, W) generated without drawing."""
    drawn: list[Tensor] = field(default_factory=list)
    """(B, H, W) drawn with the same seeds."""


def score_formats(
    *,
    checkpoint: str,
    data: str,
    formats: str = "packed,int8,fp8",
    plan: Plan | None = None,
    split: Literal["train", "validation", "test"] = "test",
    limit: int = 64,
    batch_size: int = 16,
    cfg_scale: float = 1.0,
    seed: int = 0,
    branch_layer: int | None = None,
    weights: Weights = "auto",
    n_head: int | None = None,
    assets: str | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Likelihood, agreement of codes and memory of a checkpoint with its weights in other formats.

    Every format is compared with the checkpoint's own weights on the same held-out images: negative log-likelihood,
    how often the most likely code is the same given the true image so far, and how many codes of generated images are
    equal, without drawing and drawn with equal seeds. One different code changes all that follow it, so the last two
    fall fast where the first says that little changed. int8 and fp8 need torchao. Prints a Markdown table.

    Example:
        flashar score formats --checkpoint runs/demo/flashar/checkpoints/last.ckpt --data data/digits

    Args:
        checkpoint: Lightning checkpoint, converted directory, or official .pt or .safetensors file.
        data: directory of shards with their manifest.json.
        formats: packed (CPU only), int8, fp8, separated by commas.
        plan: decoding order. Default: the checkpoint's own.
        split: which images.
        limit: compare on at most this many images, spread evenly over the split.
        batch_size: images at once; all their logits are in memory.
        cfg_scale: classifier-free guidance of the generated images; 1 is off.
        seed: of the drawn images; image i uses seed + i.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        n_head: attention heads, for official files of unpublished sizes.
        assets: directory with emu3.tiktoken, for captions and an Emu3.5 model.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights before they change format, and of activations.
        out: also write the result to this new JSON file.
    """
    from flashar_pl.data.shards import Manifest
    from flashar_pl.decoding.prepare import model_bytes, prepare
    from flashar_pl.sampling import SamplingSettings

    if batch_size < 1 or limit < 1:
        raise ValueError(f"batch_size is {batch_size}, limit {limit}; expected 1 or more.")
    SamplingSettings(cfg_scale)
    names = check_formats(formats)
    if out is not None:
        require_new(out, "comparison")
    manifest = Manifest.load(data)
    source = open_checkpoint(
        ModelOptions(checkpoint, weights, n_head, branch_layer=branch_layer), DeviceOptions(device, dtype)
    )
    check_data(source.model, manifest, None, source.tokenizer)
    encoder = caption_encoder(source, manifest, assets)
    plan_name = check_plan(source.model, plan, manifest.grid)
    batches = list(held_out(manifest, split, batch_size, limit, encoder, find_device(device)))
    rows: list[dict[str, Any]] = []
    with progress_bar((1 + len(names)) * len(batches), "batches") as advance:
        expected = behaviour(source.model, batches, plan_name, cfg_scale, seed, advance)
        rows.append({"format": "plain", **compared(expected, expected), "bytes": model_bytes(source.model)})
        for name in names:
            model = prepare(source.model, name)
            found = behaviour(model, batches, plan_name, cfg_scale, seed, advance)
            rows.append({"format": name, **compared(found, expected), "bytes": model_bytes(model)})
            del model  # room for the next copy
    result = {
        "images": sum(map(len, expected.nll)),
        "plan": plan_name,
        "cfg_scale": cfg_scale,
        "split": split,
        "data": {"path": data, "name": manifest.name, "fingerprint": manifest.fingerprint(split)},
        "dtype": source.dtype,
        "device": str(find_device(device)),
        "rows": rows,
        "checkpoint": source.facts(),
        "versions": versions(),
    }
    print(table(rows))
    if out is not None:
        write_json(out, result)
    return result


def check_formats(text: str) -> list[WeightFormat]:
    """The formats of a list with commas. Raises ValueError for unknown ones."""
    known = [name for name in get_args(WeightFormat) if name not in ("auto", "plain")]
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"format is {name!r}; expected one of {', '.join(known)}, or several separated by commas.")
    return names  # type: ignore[return-value]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    header = ("weights", "MB", "NLL (nats per image)", "change per image", "same likeliest code", "greedy", "drawn")
    lines = [
        [
            row["format"],
            f"{1e-6 * row['bytes']:.2f}",
            f"{row['nll']:.3f}",
            f"{row['nll_change']:+.4f} ± {row['nll_change_error']:.4f}",
            *(f"{row[name]:.1%}" for name in ("same_first", "same_greedy", "same_drawn")),
        ]
        for row in rows
    ]
    return markdown(header, lines)


def behaviour(
    model: GridModel, batches: list[Batch], plan: str, cfg_scale: float, seed: int, advance: Callable[[int], Any]
) -> Behaviour:
    """Likelihood and codes of a model on `batches`; padded images are left out."""
    import torch

    from flashar_pl.decoding import Engine

    engine, found, first_seed = Engine(model), Behaviour(), seed
    for batch in batches:
        grid = (batch.codes.shape[1], batch.codes.shape[2])
        keep = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid.cpu()
        with torch.no_grad():
            logits = model(batch.codes, batch.condition, model.make_plan(plan, *grid)).fused  # (B, H, W, V) float32
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), batch.codes.flatten(), reduction="none")
        found.nll.append(losses.view(len(batch), -1).double().sum(1).cpu()[keep])
        found.first.append(logits.argmax(-1).cpu()[keep])
        for codes, greedy in ((found.greedy, True), (found.drawn, False)):
            made = engine.generate(batch.condition, grid, plan, cfg_scale, greedy=greedy, seeds=first_seed)
            codes.append(made.cpu()[keep])
        first_seed += len(batch)
        advance(1)
    return found


def compared(found: Behaviour, expected: Behaviour) -> dict[str, float]:
    """Mean NLL, its change with the standard error of the paired differences, and shares of equal codes."""
    import torch

    nll = torch.cat(found.nll)
    change = nll - torch.cat(expected.nll)
    error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else float("nan")

    def same(name: str) -> float:
        a, b = (torch.cat(getattr(each, name)) for each in (found, expected))
        return float((a == b).double().mean())

    return {
        "nll": float(nll.mean()),
        "nll_change": float(change.mean()),
        "nll_change_error": error,
        "same_first": same("first"),
        "same_greedy": same("greedy"),
        "same_drawn": same("drawn"),
    }
