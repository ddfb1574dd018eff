"""Checkpoints of FlashAR for Emu3.5 as its authors released it (lxazjk/Emu3.5-FlashAR), in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.emu35 import Emu35, Emu35Config, Heads
from flashar_pl.checkpoints.emu35 import MODEL_TYPE, OfficialDirectory, with_text_rows
from flashar_pl.checkpoints.llama_names import block_renames, body_renames, head_rename, is_table
from flashar_pl.checkpoints.nar import GATE_RENAMES
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.renames import Rename, TensorSource, build_filled, split_rows

IGNORED = ("fuse_h_logit", "fuse_corner_h_logit")
"""Parameters of earlier versions that some saved files carry; the released code does not use them."""


def renames(config: Emu35Config, vertical_layers: int) -> list[Rename]:
    """Names of a released checkpoint."""
    names = [
        *body_renames(config, "backbone.", "backbone."),
        head_rename(config, "dual_head.horizontal.weight", "horizontal_head.weight"),
        head_rename(config, "dual_head.vertical.weight", "vertical_head.weight"),
        Rename("vertical.norm.weight", ("vertical_norm.weight",)),
        *GATE_RENAMES,
        Rename("dual_head.corner_gate.out.weight", ("hv_gate_corner.weight",)),
        Rename("dual_head.corner_gate.out.bias", ("hv_gate_corner.bias",)),
    ]
    for i in range(vertical_layers):
        names += block_renames(config, f"vertical.blocks.{i}.", f"vertical_block.{i}.")
    return names


def branch(values: dict[str, Any], n_layer: int) -> tuple[int, int]:
    """(m, k) from a released config.json: the branch layer and the number of vertical layers."""
    k = values.get("vertical_layers")
    if not values.get("use_vertical_block", True) or not k:
        raise ValueError(
            f"config.json has use_vertical_block {values.get('use_vertical_block')!r}, vertical_layers {k!r}; "
            "expected a checkpoint with at least one vertical layer."
        )
    start = values.get("vertical_start_layer")
    m = n_layer - k if start is None or start < 0 else start
    return m, k


def read_released(directory: str | Path, heads: Heads) -> ReleasedFlashAR:
    """See `FlashAR.from_released`."""
    source = OfficialDirectory(directory)
    if not source.released:
        raise ValueError(f"config.json has model_type {source.values.get('model_type')!r}; expected {MODEL_TYPE!r}.")
    return read_model(source, heads)


def read_model(
    source: OfficialDirectory, heads: Heads, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ReleasedFlashAR:
    """The weights are read into memory of `device`; dtype None = the checkpoint's."""
    config = source.config(heads)
    m, k = branch(source.values, config.n_layer)
    return build_filled(
        lambda: ReleasedFlashAR(Emu35(config), m, k),
        source, renames(config, k), device, dtype, ignored(source),
    )  # fmt: skip


def ignored(source: TensorSource) -> list[str]:
    """Entries that are no weights, or, like head biases of zeros, add nothing. A bias with values is left to be
    refused."""
    biases = [key for key in ("horizontal_head.bias", "vertical_head.bias") if key in set(source.keys())]
    zeros = [key for key in biases if not source.rows(key, 0, source.shape(key)[0]).any()]
    return [*IGNORED, *zeros, *filter(is_table, source.keys())]


def write_released(model: ReleasedFlashAR, source: str | Path | None = None) -> dict[str, Tensor]:
    """See `ReleasedFlashAR.to_released`."""
    config = model.backbone.config
    official = split_rows(model.state_dict(), renames(config, model.vertical_layers))
    return with_text_rows(official, ("horizontal_head.weight", "vertical_head.weight"), config, source)
