"""What test_tensor_parallel.py asks of two ranks: codes of whole models, and of the same models that they share."""

import os
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from typing import Any

import tiny
import torch
import torch.distributed as dist

from flashar_pl.backbones import Decoder, DecoderConfig
from flashar_pl.cli import main
from flashar_pl.decoding import Engine, generate
from flashar_pl.decoding.tensor_parallel import cut_model
from flashar_pl.layers.tensor_parallel import Share
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.models.base import GridModel
from flashar_pl.models.baselines import PAR
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes

JOB = {"TORCHELASTIC_RUN_ID": "one", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def decoder(**options: Any) -> Decoder:
    """A decoder with biases, norms of every head and norms on both sides."""
    own = {"norm_place": "both", "visual_token_offset": 1275, "heads": "full", **options}
    return Decoder(DecoderConfig(**{**Decoder.example, **own}))


MODELS = {
    "llamagen": tiny.flashar,  # 19 codes: two ranks hold ten each
    "logit gate": lambda: tiny.flashar(fusion="logit_gate"),
    "groups": lambda: tiny.flashar(intra={"groups": 4}),
    "captions": lambda: tiny.flashar(condition="text"),
    "raster": lambda: RasterAR(tiny.backbone()),
    "PAR": lambda: PAR(tiny.backbone()),
    "emu": tiny.emu_flashar,
    "emu raster": lambda: RasterAR(tiny.emu()),
    "emu one kv head": lambda: tiny.emu_flashar(n_kv_head=1),  # both ranks hold it
    "released": lambda: ReleasedFlashAR(tiny.emu(), 2, 1),
    "biases": lambda: FlashAR(decoder(), 1),
    "mlp of text": lambda: FlashAR(decoder(first_image_token=1275), 1),
    "video": lambda: FlashAR(tiny.backbone(), 1, video={"frames": 2}),
    "code mlp": lambda: FlashAR(decoder(heads="visual", code_width=6, num_visual_codes=25, eol_token_id=7), 1),
}


def model(kind: str) -> GridModel:
    """In float64, its weights random, and no part of it without effect."""
    torch.manual_seed(5)
    made = MODELS[kind]().double().eval()
    if kind in ("PAR", "released", "biases", "code mlp", "mlp of text", "video"):
        tiny.randomise(made, 3)
    return made


def codes(made: GridModel, plan: str, engine: Any = None, seed: int = 3) -> torch.Tensor:
    """Of three samples, guided."""
    grid, wanted, away = (4, 4), tiny.classes(3), None
    if made.backbone.conditioning.kind == "prompt":
        wanted, away = [torch.arange(1, 1 + n) for n in (5, 7, 6)], [torch.arange(2, 5)] * 3
    elif made.backbone.conditioning.kind == "text":
        found = tiny.captions([5, 3, 4])
        wanted = replace(found, features=found.features.double())
    draw = generate if engine is None else engine.generate
    return draw(*(() if engine else (made,)), wanted, grid, plan, cfg_scale=2.0, seeds=seed, unconditional=away)


def drawn(kind: str, plans: list[str]) -> dict[str, Any]:
    """Codes of every plan by the whole model and by both ranks' shares, and what a rank holds."""
    made = model(kind)
    whole = [codes(made, plan) for plan in plans]
    elements = sum(parameter.numel() for parameter in made.parameters())
    cache = made.cache_spec()
    cut_model(made, Share(dist.group.WORLD, torch.device("cpu")))
    engine = Engine(made)
    job = DecodeJob(model_sizes(made.config()), plans[0], (4, 4), dtype=torch.float64, devices=2)
    return {
        "whole": whole,
        "shared": [codes(made, plan, engine) for plan in plans],
        "astray": [codes(made, plan, engine, 3 + dist.get_rank()) for plan in plans],
        "held": sum(parameter.numel() for parameter in made.parameters()) / elements,
        "planned": job.model_bytes / sum(parameter.nbytes for parameter in made.parameters()),
        "kv_heads": (cache.n_kv_head, made.cache_spec().n_kv_head),
    }


def command(words: list[str]) -> int:
    """Exit code of a command in the environment that torchrun gives both ranks."""
    before = dict(os.environ)
    os.environ.update(JOB | {"RANK": str(dist.get_rank())})
    try:
        return main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)


def said(words: list[str]) -> str:
    """What a command that fails writes."""
    with redirect_stderr(StringIO()) as written:
        assert command(words) == 2
    return written.getvalue()
