"""Reference vectors of VAR: its authors' code, tiny random networks, float32 on a CPU."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashar_pl.models.baselines import VAR
from flashar_pl.tokenizers import MultiScaleVQ

FOLDER = Path(__file__).parent / "golden" / "var"


class Golden(NamedTuple):
    state: dict[str, Tensor]
    """Official names."""
    io: dict[str, Tensor]
    facts: dict[str, Any]


@cache
def read(name: str) -> Golden:
    """One file; its weights are bfloat16, the high bytes of all before the low ones, which compresses better."""
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as arrays:
        content = {key: arrays[key] for key in arrays}
    state, place = {}, 0
    if (packed := content.pop("weights", None)) is not None:
        high, low = packed.astype(np.uint32)
        flat = torch.from_numpy((high << 24 | low << 16).view(np.float32).copy())
        for key, shape in facts["weights"].items():
            n = int(np.prod(shape))
            state[key], place = flat[place : place + n].view(shape), place + n
    tensors = {key: torch.from_numpy(value) for key, value in content.items()}
    tensors = {key: value.long() if value.dtype == torch.int32 else value for key, value in tensors.items()}
    state |= {key[3:]: value for key, value in tensors.items() if key.startswith("sd/")}
    return Golden(state, {key: value for key, value in tensors.items() if not key.startswith("sd/")}, facts)


@cache
def tokenizer() -> MultiScaleVQ:
    state, _, facts = read("vqvae_tiny")
    return MultiScaleVQ.from_official(state, facts["config"])


def model(name: str = "var_tiny") -> VAR:
    state, _, facts = read(name)
    return VAR.from_official(state, facts["config"])
