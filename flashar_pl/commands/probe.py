"""`flashar probe`: which layers of a raster model a vertical head would use (Fig. 3), to choose the branch layer.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.plot import figure, require_pyplot
from flashar_pl.commands.score import caption_encoder, check_data, held_out
from flashar_pl.console import progress_bar, table, versions
from flashar_pl.files import new_directory, require_new, write_json
from flashar_pl.options import AssetOptions, ModelOptions, PlanOptions, check_least

if TYPE_CHECKING:
    from flashar_pl.backbones.condition import Batch
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.data.shards import Manifest
    from flashar_pl.grid import DecodePlan
    from flashar_pl.models.probe import LayerProbe

MIXTURE_RATE = 30.0
"""Learning rate of the layers' weights relative to the head's: they are logits, which have to move by several units."""
MOST = 0.9
"""Share of the weight that lies at or below the layer that is suggested."""
BATCH = 32
"""Images of a step, unless told."""
WINDOW = 16
"""Blocks of the shards that are shuffled together."""


@dataclass(frozen=True)
class ProbeOptions:
    """Probe"""

    data: str
    """Directory of shards with their manifest.json; trained on the training split, measured on validation."""
    out: str
    """Directory to make."""
    steps: int = 300
    """Training steps of both heads, of one batch each (32 images unless told)."""
    learning_rate: float = 1e-3
    """Of the heads, with a cosine to 0."""
    limit: int = 256
    """Measure on at most this many images, spread evenly over the split."""
    seed: int = 0
    """Of the order of images."""

    def __post_init__(self) -> None:
        check_least(self, steps=1, limit=1)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected more than 0.")


def probe(
    options: ProbeOptions,
    model: ModelOptions,
    compute: PlanOptions = PlanOptions(),
    text: AssetOptions = AssetOptions(),
) -> dict[str, Any]:
    """Learn which layers of a raster model tell the code below each cell (Fig. 3 of the paper).

    The model is frozen. The states of all its layers, at unit scale, are mixed with learnt weights and go into a
    vertical head that starts as a copy of the model's own and is trained. Where the last layers have little weight, a
    vertical branch should fork off below them: the layer up to which nine tenths of the weight lie is named. A second
    head on the last layer alone shows what the others are worth. --plan says who sees whom: raster, as the model was
    trained (unless told), or diagonal, as a vertical branch will see it. Of a FlashAR model the backbone is probed.
    Writes probe.json and probe.png into a new directory.

    Example:
        flashar probe --checkpoint runs/demo/raster/checkpoints/last.ckpt --data data/digits --out probe/
    """
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.data.shards import Manifest
    from flashar_pl.grid import make_plan
    from flashar_pl.models.probe import LayerProbe

    batch_size = compute.batch_size if isinstance(compute.batch_size, int) else BATCH
    require_pyplot()
    target = require_new(options.out, "probe")
    manifest = Manifest.load(options.data)
    for split in ("train", "validation"):
        manifest.shards(split)
    source = open_checkpoint(model, compute)
    check_data(source.model, manifest, None, source.tokenizer)
    backbone = source.model.backbone
    order = make_plan(compute.plan or "raster", *manifest.grid, row_end=backbone.row_ends)
    if order.height == 1:
        raise ValueError(f"the grid is {order.height}x{order.width}; expected several rows, one below the other.")
    probes = {"all layers": LayerProbe(backbone, range(backbone.n_layer + 1)),
              "last layer": LayerProbe(backbone, [backbone.n_layer])}  # fmt: skip
    nll = learn(probes, source, manifest, order, batch_size, options, text)
    shares = probes["all layers"].weights.tolist()
    result = {
        "plan": order.name,
        "steps": options.steps,
        "batch_size": batch_size,
        "learning_rate": options.learning_rate,
        "weights": shares,
        "branch_layer": depth_of(shares),
        "nll": nll,
        "data": {"path": options.data, "name": manifest.name, "fingerprint": manifest.fingerprint("train")},
        "checkpoint": source.facts(),
        "versions": versions(),
    }
    with new_directory(target, "probe") as folder:
        write_json(folder / "probe.json", result)
        _plot(result, folder / "probe.png")
    print(table(("layer", "weight"), [[str(i or "embeddings"), f"{share:.3f}"] for i, share in enumerate(shares)]))
    for name, found in nll.items():
        print(f"{name}: {found['before']:.4f} -> {found['after']:.4f} nats per code below (validation split)")
    print(f"{MOST:.0%} of the weight is at layers up to {depth_of(shares)}: a first choice of branch_layer. {target}")
    return result


def learn(
    probes: dict[str, LayerProbe], source: Source, manifest: Manifest, plan: DecodePlan, batch_size: int,
    options: ProbeOptions, text: AssetOptions,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Train the heads on the training split; nats per code below on the validation split, "before" and "after"."""
    from flashar_pl.data.batches import Cut, training_batches

    place, encoder = source.model.device, caption_encoder(source, manifest, text.assets)
    cut = Cut(encoder=lambda manifest: encoder)
    batches = training_batches([manifest], batch_size, options.seed, WINDOW, cut)  # epoch after epoch, shuffled
    training = (batches[divmod(step, len(batches))].to(place) for step in range(options.steps))
    validation = (manifest, "validation", batch_size, options.limit, encoder, place)
    before = _measure(probes, held_out(*validation), source, plan)
    _train(probes, training, source, plan, options)
    after = _measure(probes, held_out(*validation), source, plan)
    return {name: {"before": before[name], "after": after[name]} for name in probes}


def _train(
    probes: dict[str, LayerProbe], batches: Iterator[Batch], source: Source, plan: DecodePlan, options: ProbeOptions
) -> None:
    """All probes on the same states; AdamW, and a cosine of the learning rate to 0."""
    import torch

    from flashar_pl.models.probe import layer_states

    steps, rate, groups = options.steps, options.learning_rate, []
    for each in probes.values():
        groups.append({"params": [each.mixture], "lr": MIXTURE_RATE * rate})
        groups.append({"params": [each.scale, each.head], "lr": rate})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    with progress_bar(steps, "steps") as advance:
        for batch in batches:
            states = layer_states(source.model.backbone, batch.codes, source.model.backbone.condition_of(batch), plan)
            optimiser.zero_grad()
            for each in probes.values():
                each.nll(states, batch.codes.long(), plan)[0].backward()
            optimiser.step()
            schedule.step()
            advance(1)


def _measure(
    probes: dict[str, LayerProbe], batches: Iterator[Batch], source: Source, plan: DecodePlan
) -> dict[str, float]:
    """Mean nats of a code given the cell above it, for each probe; padding does not count."""
    import torch

    from flashar_pl.models.probe import layer_states

    found: dict[str, list[Any]] = {name: [] for name in probes}
    with torch.no_grad():
        for batch in batches:
            states = layer_states(source.model.backbone, batch.codes, source.model.backbone.condition_of(batch), plan)
            for name, each in probes.items():
                found[name].append(each.nll(states, batch.codes.long(), plan)[1][batch.valid])
    return {name: float(torch.cat(parts).double().mean()) for name, parts in found.items()}


def depth_of(weights: list[float]) -> int:
    """The first state up to which `MOST` of the weights lie."""
    return next((state for state, total in enumerate(accumulate(weights)) if total >= MOST), len(weights) - 1)


def _plot(result: dict[str, Any], path: Path) -> None:
    """The weights as bars (Fig. 3b)."""
    shares = result["weights"]
    with figure(path, 1, 1, (max(5, 0.35 * len(shares)), 3.6)) as (axis,):
        axis.bar(range(len(shares)), shares, color="#335577")
        axis.axhline(1 / len(shares), color="#999999", linewidth=1, linestyle="--", label="equal weights")
        axis.set(xlabel="layer (0: embeddings)", ylabel="weight in the vertical head's input")
        found = ", ".join(f"{name} {nll['after']:.3f}" for name, nll in result["nll"].items())
        axis.set_title(f"{result['plan']} mask\nnats per code below: {found}", fontsize=10)
        axis.legend(frameon=False)
