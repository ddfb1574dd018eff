"""One model on several devices: what of it each holds, and how a checkpoint gets there.

Every device runs the whole decoding loop on its share of the weights and of the cache (`layers.tensor_parallel`) and
draws the same codes. What is small stays whole on each: norms, gate, projections of the condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from flashar_pl.checkpoints.opening import Source, open_checkpoint
from flashar_pl.layers.tensor_parallel import GatheredEmbedding, GatheredLinear, Share, cut_block, divides, share_of
from flashar_pl.layers.transformer import Block
from flashar_pl.models.base import GridModel
from flashar_pl.options import EngineOptions, ModelOptions, RankOptions
from flashar_pl.ranks import Rank, run_on_ranks

T = TypeVar("T")
RUNNERS = ("auto", "eager", "graphs")
FORMATS = ("auto", "plain")


def on_devices(n: int, work: Callable[[Rank], T], engine: EngineOptions) -> T:
    """What `work` returns on the first of n ranks that share a model; see `run_on_ranks`. Alone, it is called here.

    Raises:
        ValueError: as `run_on_ranks`; before anything starts, a runner or a format of weights that they cannot share.
    """
    if n == 1:
        return work(Rank())
    for name, given, known in (("runner", engine.runner, RUNNERS), ("weight_format", engine.weight_format, FORMATS)):
        if given not in known:
            raise ValueError(f"{name} is {given}, which --tensor-parallel does not know; expected {', '.join(known)}.")
    return run_on_ranks(work, RankOptions(devices=n), engine.device, "tensor_parallel")


def open_share(options: ModelOptions, engine: EngineOptions, rank: Rank, n: int) -> Source:
    """A checkpoint of which this rank of n keeps its share, on its device; alone, all of it.

    Ranks read one after the other into CPU memory: beside shares a machine holds one whole model at a time.

    Raises:
        ValueError: as `open_checkpoint`; a model that several devices cannot share.
    """
    if n == 1:
        return open_checkpoint(options, engine)
    if rank.world != n:
        raise ValueError(
            f"tensor_parallel is {n}, and {rank.world} processes were started; expected {n}, of one machine."
        )
    nccl = rank.device.type == "cuda"
    share = Share(dist.new_group(backend="nccl") if nccl else dist.group.WORLD, rank.device)
    for turn in range(rank.world):
        if turn == rank.rank:
            source = open_checkpoint(options, replace(engine, device="cpu"))
            cut_model(source.model, share)
        rank.barrier()
    return source


@torch.no_grad()
def cut_model(model: GridModel, share: Share) -> None:
    """Leave this device's share of a model, on the device: for drawing, without loss or state dict.

    Of both heads only the rows that score codes are kept.

    Raises:
        ValueError: layers that cannot be cut, or not into so many shares; the numbers that can are named.
    """
    check_shares(model, share.world)
    n = share.world
    backbone: Any = model.backbone
    head: Any = model.dual_head
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        cut_block(block, share)
    backbone.block = share_of(backbone.block, n)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding) and child.embedding_dim % n == 0:
                setattr(module, name, GatheredEmbedding(child, share))
    for name in ("horizontal", "vertical"):
        if (whole := getattr(head, name)) is not None:
            setattr(head, name, GatheredLinear(share, *head.code_rows(whole)))
    owned = "head" in dict(backbone.named_children())  # else the dual head has it
    (setattr if owned else object.__setattr__)(backbone, "head", head.horizontal)
    head.first_code = backbone.first_code = 0
    model.to(share.device)


def check_shares(model: GridModel, n: int) -> None:
    """ValueError unless N devices can share a model."""
    blocks, config = [module for module in model.modules() if type(module) is Block], model.backbone.block
    if model.own_decoding or len(blocks) != model.cache_spec().n_layer:
        raise ValueError(f"a {model.method} model has layers or steps of its own; leave out --tensor-parallel.")
    if not divides(config, n):
        possible = [str(each) for each in range(1, config.n_head + 1) if divides(config, each)]
        raise ValueError(
            f"tensor_parallel is {n}, and the model has {config.n_head} query heads, {config.n_kv_head} key/value "
            f"heads and a feed-forward width of {config.ffn_dim}; expected one of {', '.join(possible)}."
        )
