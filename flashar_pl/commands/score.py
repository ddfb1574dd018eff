"""`flashar score`: negative log-likelihood of held-out images under any checkpoint and decoding plan.

Shapes: N images of the split, B of a batch, H x W grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.checkpoints.opening import Source, check_plan, open_checkpoint
from flashar_pl.console import progress_bar, versions
from flashar_pl.devices import find_device
from flashar_pl.files import require_new, write_json
from flashar_pl.options import Dtype, Plan, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.base import Batch
    from flashar_pl.data.prompt_encoder import PromptEncoder
    from flashar_pl.data.shards import Manifest
    from flashar_pl.models import GridModel


FILE_ONLY = ("checkpoint", "versions")
"""Parts of the result that are too long for a screen."""


def score(
    *,
    checkpoint: str,
    data: str,
    assets: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    plan: Plan | None = None,
    branch_layer: int | None = None,
    weights: Weights = "auto",
    n_head: int | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    out: str | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
) -> dict[str, Any]:
    """Likelihood of held-out images: nats per image and bits per code, with the standard error of the mean.

    The sum of the fused cross entropies is -log p(image) under the plan's own factorisation, so numbers of different
    plans compare directly. A raster checkpoint with --plan diagonal --branch-layer m is training-free FlashAR.
    Prints JSON; the file of --out also holds all that is known of the checkpoint.

    Example:
        flashar score --checkpoint runs/demo/flashar/checkpoints/last.ckpt --data data/digits --plan diagonal

    Args:
        checkpoint: Lightning checkpoint, converted directory, or official .pt or .safetensors file.
        data: directory of shards with their manifest.json.
        assets: directory with emu3.tiktoken, for captions and an Emu3.5 model. Default: the checkpoint's own, or the
            one it was trained with.
        split: which images.
        plan: decoding order whose factorisation is scored. Default: the checkpoint's own.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        n_head: attention heads, for official files of unpublished sizes.
        batch_size: images scored together.
        limit: score at most this many images, spread evenly over the split. Default: all.
        out: also write the JSON to this new file.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations; the cross entropy stays in float32. Default: fp32, for official Emu3.5
            directories that of the files.
    """
    from flashar_pl.data.shards import Manifest

    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size}, limit {limit}; expected 1 or more.")
    if out is not None:
        require_new(out, "scores")
    manifest = Manifest.load(data)
    manifest.shards(split)
    source = open_checkpoint(
        checkpoint, weights=weights, n_head=n_head, branch_layer=branch_layer, device=device, dtype=dtype
    )
    several = list(manifest.grid) in source.description.training.get("grids", [])
    check_data(source.model, manifest, None if several else source.grid, source.tokenizer)
    encoder = caption_encoder(source, manifest, assets)
    name = check_plan(source.model, plan, manifest.grid)
    total = min(manifest.samples(split), limit or manifest.samples(split))
    with progress_bar(total, "images") as advance:
        nll = image_nll(source.model, manifest, split, name, batch_size, limit, advance, encoder)  # (N,)
    result = {
        **summary(nll, manifest.grid[0] * manifest.grid[1]),
        "plan": name,
        "split": split,
        "data": {"path": data, "name": manifest.name, "fingerprint": manifest.fingerprint(split)},
        "branch_layer": branch_layer,
        "weights": weights,
        "dtype": source.dtype,
        "device": str(find_device(device)),
        "checkpoint": source.facts(),
        "versions": versions(),
    }
    print(json.dumps({name: value for name, value in result.items() if name not in FILE_ONLY}, indent=2))
    if out is not None:
        write_json(out, result)
    return result


def summary(nll: Tensor, cells: int) -> dict[str, Any]:
    """Mean, standard error and bits per code of per-image NLL (N,) in nats."""
    n, mean = len(nll), float(nll.double().mean())
    error = float(nll.double().std() / math.sqrt(n)) if n > 1 else float("nan")
    return {
        "images": n,
        "nll_nats_per_image": mean,
        "standard_error": error if n > 1 else None,
        "bits_per_code": mean / (cells * math.log(2)),
    }


def check_data(
    model: GridModel, manifest: Manifest, grid: tuple[int, int] | None = None, tokenizer: dict[str, Any] | None = None
) -> None:
    """ValueError unless `model` can be scored on these shards; grid and tokenizer None = not known, not compared."""
    from flashar_pl.backbones.llamagen import LlamaGen
    from flashar_pl.data.manifest import check_matches

    backbone = model.backbone
    classes = width = None
    if isinstance(backbone, LlamaGen):
        text = backbone.config.condition == "text"
        classes, width = (None, backbone.config.caption_dim) if text else (backbone.config.num_classes, None)
    check_matches(manifest, backbone.vocabulary, num_classes=classes, grid=grid, text_width=width)
    if tokenizer is not None and tokenizer.get("kind") != manifest.tokenizer.get("kind"):
        raise ValueError(
            f"the checkpoint was trained on codes of the tokenizer {tokenizer.get('kind')!r}, the shards of "
            f"{manifest.name!r} hold codes of {manifest.tokenizer.get('kind')!r}."
        )


def caption_encoder(source: Source, manifest: Manifest, assets: str | None) -> PromptEncoder | None:
    """What turns captions into prefixes of an Emu3.5 model, cut as in its training; None for another model.

    Raises:
        ValueError: captions without assets, assets that are not the model's, or assets that have no use.
    """
    from flashar_pl.backbones.emu35 import Emu35
    from flashar_pl.data.prompt_encoder import PromptEncoder
    from flashar_pl.decoding.prompts import find_assets
    from flashar_pl.tokenizers.text import MAX_PROMPT

    backbone = source.model.backbone
    if not isinstance(backbone, Emu35):
        if assets is not None:
            raise ValueError("--assets is for Emu3.5 models; leave it out.")
        return None
    longest = source.description.training.get("max_prompt", MAX_PROMPT)
    encoder = PromptEncoder(find_assets(source, assets), manifest.grid, longest)
    encoder.text.check_vocabulary(backbone.config.visual_token_offset)
    return encoder


def held_out(
    manifest: Manifest,
    split: str,
    batch_size: int,
    limit: int | None,
    text_encoder: Callable[[str], Tensor] | None,
    device: Any,
) -> Iterator[Batch]:
    """Batches of a split on a device, at most `limit` images spread evenly; a last one holds padding."""
    from flashar_pl.data.loader import EvaluationBatches
    from flashar_pl.data.order import EvaluationOrder
    from flashar_pl.data.shards import ShardReader

    reader = ShardReader(manifest, split)
    batches = EvaluationBatches(reader, EvaluationOrder(len(reader), batch_size, limit), text_encoder=text_encoder)
    for g in range(len(batches)):
        yield batches[g].to(device)


def image_nll(
    model: GridModel,
    manifest: Manifest,
    split: str,
    plan: str,
    batch_size: int,
    limit: int | None = None,
    advance: Callable[[int], Any] | None = None,
    text_encoder: Callable[[str], Tensor] | None = None,
) -> Tensor:
    """NLL (N,) float64 in nats of each image of a split, on the CPU, in the split's order.

    advance: called with the number of scored images after every batch.
    text_encoder: for shards with captions, see `caption_encoder`.
    """
    import torch

    device = next(model.parameters()).device
    parts = []
    with torch.no_grad():
        for batch in held_out(manifest, split, batch_size, limit, text_encoder, device):
            losses = model.loss(batch.codes, batch.condition, model.make_plan(plan, *manifest.grid), batch.valid)
            assert batch.valid is not None
            parts.append(losses["nll"][batch.valid].double().cpu())  # (B,)
            if advance is not None:
                advance(len(parts[-1]))
    return torch.cat(parts)
