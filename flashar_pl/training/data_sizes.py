"""Sizes of a model that its data has: number of codes and of classes, where a configuration leaves them out."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from flashar_pl.backbones.registry import DEFAULT, FAMILIES
from flashar_pl.data.manifest import load_grids
from flashar_pl.training.words import Words

OWN = ("preset", "directory", "class_path")
"""What gives a backbone all its sizes."""


def with_data_sizes(words: Words) -> Words:
    """The same words with the shards' sizes as options of the backbone, below all that files and options give.

    Nothing is added to a published or released model, to a backbone of one's own, or where the shards cannot be read:
    the data module says why.
    """
    kind = words.given("model.backbone.kind") or DEFAULT
    shards = words.given("data.shards") or words.given("data.init_args.shards")
    if any(words.given(f"model.backbone.{name}") for name in OWN) or kind not in FAMILIES or not shards:
        return words
    try:
        manifest = load_grids(str(next(iter(shards)) if isinstance(shards, dict) else shards))[0]
    except (ValueError, OSError):
        return words
    sizes = FAMILIES[kind].data_options(manifest.vocabulary, manifest.condition.num_classes)
    sizes = {name: size for name, size in sizes.items() if words.given(f"model.backbone.options.{name}") is None}
    if not sizes:
        return words
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    rank_zero_info(f"Sizes of the model that {shards} gives: {listed}.")
    return words.before({"model": {"backbone": {"options": sizes}}})
