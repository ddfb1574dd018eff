"""`flashar score`: negative log-likelihood of held-out images under any checkpoint and decoding plan.

Shapes: N images of the split, B of a batch, H x W grid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashar_pl.console import progress_bar, versions
from flashar_pl.files import json_text, require_new, write_json
from flashar_pl.options import AssetOptions, ModelOptions, PlanOptions, Split, check_least

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.condition import Batch, Condition
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.data.prompt_encoder import PromptEncoder
    from flashar_pl.data.shards import Manifest
    from flashar_pl.models import GridModel


CAPTIONS = 64
"""Captions of the test split that samples are drawn for."""
TOGETHER = 64
"""Images of one forward, unless told."""
FILE_ONLY = ("checkpoint", "versions")
"""Parts of the result that are too long for a screen."""


@dataclass(frozen=True)
class DataOptions:
    """Images"""

    data: str
    """Directory of shards with their manifest.json."""
    split: Split = "test"
    """Which images."""
    limit: int | None = None
    """At most this many images, spread evenly over the split. Default: all."""

    def __post_init__(self) -> None:
        check_least(self, limit=1)

    def number(self, manifest: Manifest) -> int:
        """How many images."""
        return min(manifest.samples(self.split), self.limit or manifest.samples(self.split))


def score(
    images: DataOptions,
    model: ModelOptions,
    compute: PlanOptions = PlanOptions(),
    text: AssetOptions = AssetOptions(),
    *,
    out: str | None = None,
) -> dict[str, Any]:
    """Likelihood of held-out images: nats per image and bits per code, with the standard error of the mean.

    The sum of the fused cross entropies is -log p(image) under the plan's own factorisation, so numbers of different
    plans compare directly. A raster checkpoint with --branch-layer m is training-free FlashAR; see --plan limited.
    Prints JSON; the file of --out also holds all that is known of the checkpoint.

    Example:
        flashar score --checkpoint runs/demo/flashar/checkpoints/last.ckpt --data data/digits --plan diagonal

    Args:
        out: also write the JSON to this new file.
    """
    from flashar_pl.data.shards import Manifest
    from flashar_pl.devices import find_device

    if out is not None:
        require_new(out, "scores")
    manifest = Manifest.load(images.data)
    manifest.shards(images.split)
    source, name, nll = likelihoods(manifest, images, model, compute, text)
    result = {
        **summary(nll, manifest.grid[0] * manifest.grid[1]),
        "plan": name,
        "split": images.split,
        "data": {"path": images.data, "name": manifest.name, "fingerprint": manifest.fingerprint(images.split)},
        "branch_layer": model.branch_layer,
        "weights": model.weights,
        "dtype": source.dtype,
        "device": str(find_device(compute.device)),
        "checkpoint": source.facts(),
        "versions": versions(),
    }
    print(json_text({name: value for name, value in result.items() if name not in FILE_ONLY}, "scores"))
    if out is not None:
        write_json(out, result)
        print(f"wrote {out}", file=sys.stderr)
    return result


def likelihoods(
    manifest: Manifest, images: DataOptions, model: ModelOptions, compute: PlanOptions, text: AssetOptions
) -> tuple[Source, str, Tensor]:
    """A checkpoint, the plan it was scored under, and its NLL (N,) float64 in nats on the CPU, by image."""
    from flashar_pl.checkpoints.opening import check_plan, open_checkpoint

    source = open_checkpoint(model, compute)
    several = list(manifest.grid) in source.description.training.get("grids", [])
    check_data(source.model, manifest, None if several else source.grid, source.tokenizer)
    encoder = caption_encoder(source, manifest, text.assets)
    name = check_plan(source.model, compute.plan, manifest.grid)
    together = compute.batch_size if isinstance(compute.batch_size, int) else TOGETHER
    with progress_bar(images.number(manifest), "images") as advance:
        batches = held_out(manifest, images.split, together, images.limit, encoder, source.model.device)
        return source, name, image_nll(source.model, batches, name, advance)


def summary(nll: Tensor, cells: int) -> dict[str, Any]:
    """Mean, standard error and bits per code of per-image NLL (N,) float64 in nats."""
    n, mean = len(nll), float(nll.mean())
    return {
        "images": n,
        "nll_nats_per_image": mean,
        "standard_error": float(nll.std()) / math.sqrt(n) if n > 1 else None,
        "bits_per_code": mean / (cells * math.log(2)),
    }


def check_data(
    model: GridModel, manifest: Manifest, grid: tuple[int, int] | None = None, tokenizer: dict[str, Any] | None = None
) -> None:
    """ValueError unless `model` can be scored on these shards; grid and tokenizer None = not known, not compared."""
    from flashar_pl.data.manifest import check_frames, check_matches

    check_matches(manifest, model.backbone.vocabulary, model.backbone.conditioning, grid)
    check_frames(manifest, model.frames)
    if tokenizer is not None and tokenizer.get("kind") != manifest.tokenizer.get("kind"):
        raise ValueError(
            f"the checkpoint was trained on codes of the tokenizer {tokenizer.get('kind')!r}, the shards of "
            f"{manifest.name!r} hold codes of {manifest.tokenizer.get('kind')!r}."
        )


def caption_encoder(source: Source, manifest: Manifest, assets: str | None) -> PromptEncoder | None:
    """What turns captions into whole prompts, cut as in training; None for a model that takes none.

    Raises:
        ValueError: captions without assets, assets that are not the model's, or assets that have no use.
    """
    from flashar_pl.data.prompt_encoder import PromptEncoder
    from flashar_pl.decoding.prompts import find_assets
    from flashar_pl.tokenizers.prompts import MAX_PROMPT

    takes = source.model.backbone.conditioning
    if takes.kind != "prompt":
        if assets is not None:
            raise ValueError("--assets is for models that take whole prompts; leave it out.")
        return None
    longest = source.description.training.get("max_prompt", MAX_PROMPT)
    encoder = PromptEncoder(find_assets(source, assets), manifest.grid, longest)
    encoder.text.check_vocabulary(takes.size, takes.first_visual)
    return encoder


def held_out(
    manifest: Manifest,
    split: str,
    batch_size: int,
    limit: int | None,
    text_encoder: Callable[[str], Tensor] | None,
    device: Any,
) -> Iterator[Batch]:
    """Batches of a split on a device, at most `limit` images spread evenly; the last one may hold padding."""
    from flashar_pl.data.batches import Cut, evaluation_batches

    batches = evaluation_batches([manifest], split, batch_size, limit, Cut(encoder=lambda manifest: text_encoder))
    for g in range(len(batches)):
        yield batches[g].to(device)


def conditions_of(manifest: Manifest, text_encoder: Callable[[str], Tensor] | None) -> Condition:
    """What samples are drawn for: one entry for each class, or those of the first test images."""
    import torch

    from flashar_pl.backbones.condition import ClassIds, Condition

    if manifest.condition.num_classes is not None:
        return ClassIds(torch.arange(manifest.condition.num_classes))
    batches = held_out(manifest, "test", CAPTIONS, CAPTIONS, text_encoder, "cpu")  # padding stands at the end
    return Condition.cat([each.condition for each in batches]).rows(range(min(CAPTIONS, manifest.samples("test"))))


def image_nll(
    model: GridModel, batches: Iterable[Batch], plan: str, advance: Callable[[int], Any] = lambda n: None
) -> Tensor:
    """NLL (N,) float64 in nats of each valid image of some batches, on the CPU, in their order.

    advance: called with the number of scored images after every batch.

    Raises:
        ValueError: a likelihood is NaN or infinite: broken weights, or numbers too large for the model's precision.
    """
    import torch

    parts = []
    with torch.no_grad():
        for batch in batches:
            order = model.make_plan(plan, *batch.codes.shape[1:])
            valid = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid
            nll = model.loss(batch.codes, model.backbone.condition_of(batch), plan=order, valid=batch.valid)["nll"]
            parts.append(nll[valid].cpu().double())  # (B,)
            _check_finite(parts[-1], batch, valid, plan)
            advance(len(parts[-1]))
    return torch.cat(parts)


def _check_finite(nll: Tensor, batch: Batch, valid: Tensor, plan: str) -> None:
    """ValueError for a likelihood of the valid images (B,) of a batch that is none."""
    bad = nll.isfinite().logical_not().nonzero()
    if len(bad):
        ids = range(len(batch)) if batch.index is None else batch.index[valid].tolist()
        raise ValueError(
            f"the {plan} likelihood of image {ids[int(bad[0])]} of the split is {float(nll[bad[0]])}; the model's "
            "weights are broken, or too large for this --dtype."
        )
