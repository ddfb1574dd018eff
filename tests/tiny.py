"""Tiny models with weights large enough that every part matters, conditions for them, and golden vectors.

Golden files hold official state dicts (`sd/`), inputs (`in/`) and the official implementation's outputs (`out/`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flashar_pl.backbones import Emu35, Emu35Config, LlamaGen, LlamaGenConfig, TextFeatures
from flashar_pl.models import FlashAR

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, CLASSES, CAPTION_DIM = 19, 5, 12
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""Tolerance of logits against golden values."""


def llamagen_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Official state dict, and the other arrays."""
    with np.load(GOLDEN / "llamagen" / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd/")}
    return state, {key: value for key, value in tensors.items() if not key.startswith("sd/")}


def flashar_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same for the golden vectors of the FlashAR authors' code."""
    folder = GOLDEN / "flashar"
    return load_file(folder / f"{name}_state.safetensors"), load_file(folder / f"{name}_io.safetensors")


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Weights under which no layer, norm, head or gate is close to doing nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(("norm" in name) + 0.2 * noise)
        elif "embedding" in name and "fc" not in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


def backbone(seed: int = 0, **overrides: Any) -> LlamaGen:
    """A random LlamaGen in evaluation mode; class-conditional unless overridden."""
    sizes = {"dim": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "num_classes": CLASSES}
    torch.manual_seed(seed)
    model = LlamaGen(LlamaGenConfig(**{**sizes, "multiple_of": 8, "caption_dim": CAPTION_DIM, **overrides}))
    randomise(model, seed)
    return model.eval()


def flashar(seed: int = 0, m: int = 1, k: int | None = None, fusion: Any = "gate", corner: Any = "horizontal",
            intra: Any = None, **overrides: Any) -> FlashAR:  # fmt: skip
    """A FlashAR model whose branches, heads and gate differ from one another, as after training."""
    model = FlashAR(backbone(seed, **overrides), m, k, fusion, corner, intra).eval()
    randomise(model, seed + 1)
    return model


def emu(**overrides: Any) -> Emu35:
    """A random Emu3.5: 40 codes after 20 text tokens, row ends."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 48, "vocab_size": 60}
    ids = {"visual_token_offset": 20, "eol_token_id": 3, "boi_token_id": 4}
    made = Emu35(Emu35Config(**{**sizes, "rope_base": 1e4, "norm_eps": 1e-6, **ids, **overrides}))
    for parameter in made.parameters():
        parameter.data.mul_(8.0)
    return made


def emu_flashar(**overrides: Any) -> FlashAR:
    """A FlashAR model on it whose branches differ and whose gate is not constant."""
    model = FlashAR(emu(**overrides), 2)
    assert model.dual_head.vertical is not None
    assert model.dual_head.gate is not None
    with torch.no_grad():
        for parameter in (*model.vertical.parameters(), model.dual_head.vertical.weight):
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.dual_head.gate.out.weight.normal_()
    return model.eval()


def codes(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, height, width), generator=generator)


def classes(batch: int) -> Tensor:
    return torch.arange(batch) % CLASSES


def captions(lengths: list[int], positions: int = 5, seed: int = 0, masked: bool = True) -> TextFeatures:
    """Left-padded text features; padded positions hold noise that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), positions, CAPTION_DIM, generator=generator)
    mask = torch.arange(positions) >= positions - torch.tensor(lengths)[:, None]
    return TextFeatures(features, mask if masked else None)
