"""Official weights of the baselines on LlamaGen in and out: LlamaGen's table of names and a few more.

The configuration comes with the weights, and every tensor is checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.llamagen import backbone_renames, clean_official, count_layers, infer_config
from flashar_pl.checkpoints.methods import check_method
from flashar_pl.models.baselines import PAR, BlockDiffusion
from flashar_pl.renames import Rename, StateDict, build_filled, split_rows

SIZES = ("dim", "n_layer", "n_head", "vocab_size", "num_classes")
"""What a configuration must have."""
OTHERS = ("n_kv_head", "multiple_of", "ffn_dim_multiplier", "ffn_dim", "rope_base", "norm_eps")
"""What it may have, where it is not None."""
LEARNABLE = Rename("learnable.weight", ("spe_tok_embeddings.special_embeddings.weight",))

EMBEDDING = "tok_embeddings.weight"
"""BlockDiffusion keeps the mask token in its last row."""
TIME = tuple(
    Rename(f"time.{ours}.{part}", (f"t_embedder.mlp.{theirs}.{part}",))
    for ours, theirs in (("hidden", 0), ("out", 2))
    for part in ("weight", "bias")
)


def llamagen_config(config: Mapping[str, Any]) -> LlamaGenConfig:
    """The backbone that an official configuration describes. ValueError for what is missing, or no class model."""
    if missing := [name for name in SIZES if name not in config]:
        raise ValueError(f"the configuration has no {', '.join(missing)}; expected at least {', '.join(SIZES)}.")
    kind, prefix = config.get("model_type", "c2i"), config.get("cls_token_num", 1)
    if kind != "c2i" or prefix != 1:
        raise ValueError(
            f"the configuration says model_type {kind!r} with {prefix} condition tokens; expected 'c2i' with 1."
        )
    chosen = {name: config[name] for name in OTHERS if config.get(name) is not None}
    return LlamaGenConfig(**{name: config[name] for name in SIZES}, **chosen)


def square_grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(g, g) of a configuration with block_size = g * g; None without one. ValueError if it is no square."""
    cells = config.get("block_size")
    if cells is None:
        return None
    if math.isqrt(cells) ** 2 != cells:
        raise ValueError(f"block_size is {cells}; expected a square number, the cells of a square grid.")
    return math.isqrt(cells), math.isqrt(cells)


def _backbone_renames(n_layer: int) -> list[Rename]:
    return [rename.under("backbone.", "") for rename in backbone_renames(n_layer, "class")]


def read_par(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> PAR:
    """See `PAR.from_official`."""
    cleaned, sizes = clean_official(state_dict), llamagen_config(config)
    check_method(cleaned, "PAR")
    n = config.get("ar_token_num", 4)
    extra = config.get("spe_token_num", n - 1)
    if extra != n - 1:
        raise ValueError(f"ar_token_num is {n} and spe_token_num {extra}; expected spe_token_num {n - 1}.")
    return _filled_par(cleaned, sizes, n, square_grid(config))


def read_par_file(
    cleaned: dict[str, Tensor], n_head: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PAR:
    """A model from a cleaned state dict alone; its sizes are those of the tensors. dtype None = that of the weights."""
    sizes = infer_config(cleaned, n_head, n_layer=count_layers(cleaned), rope_base=10000.0, norm_eps=1e-5)
    return _filled_par(cleaned, sizes, len(cleaned[LEARNABLE.pieces[0]]) + 1, None, device, dtype)


def _filled_par(
    cleaned: dict[str, Tensor],
    sizes: LlamaGenConfig,
    n: int,
    grid: tuple[int, int] | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PAR:
    renames, source = [*_backbone_renames(sizes.n_layer), LEARNABLE], StateDict(cleaned, "the PAR state dict")
    return build_filled(lambda: PAR(LlamaGen(sizes), n, grid), source, renames, device, dtype)


def write_par(model: PAR) -> dict[str, Tensor]:
    """See `PAR.to_official`."""
    return split_rows(model.state_dict(), [*_backbone_renames(model.backbone.n_layer), LEARNABLE])


def read_block_diffusion(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], strategy: str, clean_context: bool
) -> BlockDiffusion:
    """See `BlockDiffusion.from_official`."""
    cleaned, sizes = clean_official(state_dict), llamagen_config(config)
    check_method(cleaned, "BlockDiffusion")
    mask = Rename("mask.weight", (EMBEDDING,), skip=sizes.vocab_size)
    return build_filled(
        lambda: BlockDiffusion(LlamaGen(sizes), strategy, clean_context, grid=square_grid(config)),
        StateDict(cleaned, "the BlockDiffusion state dict"),
        [*_backbone_renames(sizes.n_layer), *TIME, mask],  # the mask last: its row is the whole table's last
    )


def write_block_diffusion(model: BlockDiffusion) -> dict[str, Tensor]:
    """See `BlockDiffusion.to_official`."""
    official = split_rows(model.state_dict(), [*_backbone_renames(model.backbone.n_layer), *TIME])
    official[EMBEDDING] = torch.cat([official[EMBEDDING], model.mask.weight.detach()])
    return official
