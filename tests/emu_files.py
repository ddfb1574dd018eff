"""Released Emu3.5 files in miniature: prompt assets, base model, the authors' FlashAR, image tokenizer."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from flashar_pl.backbones import Emu35, Emu35Config
from flashar_pl.checkpoints.emu35 import MODEL_TYPE
from flashar_pl.models.released import ReleasedFlashAR

IBQ_GOLDEN = Path(__file__).parent / "golden" / "ibq"
CODES = 256
"""Codes of the golden image tokenizer."""
OFFSET = 256 + 208 + 3
"""Bytes, special tokens, image tokens: the ids before the visual ones."""


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 180, 40)}
WIDE = 7
"""Every seventh image is four times as wide as high."""


def write_assets(directory: Path) -> Path:
    """emu3.tiktoken of single bytes, so that ids of ASCII text are its characters."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (directory / "emu3.tiktoken").write_bytes(ranks)
    return directory


def config(**overrides: object) -> Emu35Config:
    """A two-layer model for these assets, full heads."""
    sizes = {"dim": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "ffn_dim": 48}
    ids = {"visual_token_offset": OFFSET, "eol_token_id": 256 + 203, "boi_token_id": 256 + 209}
    rope = {"vocab_size": OFFSET + CODES, "rope_base": 1e4, "norm_eps": 1e-6}
    return Emu35Config(**{**sizes, **ids, **rope, **overrides})  # type: ignore[arg-type]


def backbone(scale: float = 8) -> Emu35:
    """Weights large enough that every token matters."""
    torch.manual_seed(0)
    model = Emu35(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


def hf_config(values: Emu35Config) -> dict[str, object]:
    """The fields of a published config.json."""
    return {
        "hidden_size": values.dim,
        "num_hidden_layers": values.n_layer,
        "num_attention_heads": values.n_head,
        "num_key_value_heads": values.n_kv_head,
        "head_dim": values.head_dim,
        "intermediate_size": values.ffn_dim,
        "vocab_size": values.vocab_size,
        "rope_theta": values.rope_base,
        "rms_norm_eps": values.norm_eps,
        "eol_token_id": values.eol_token_id,
        "boi_token_id": values.boi_token_id,
        "eoi_token_id": OFFSET - 1,
    }


def write_base(directory: Path, assets: bool = True, scale: float = 8) -> Path:
    """BAAI's directory, with the prompt assets in it as published."""
    directory.mkdir(parents=True, exist_ok=True)
    model = backbone(scale)
    save_file(model.to_official(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "Emu3", **hf_config(model.config)}))
    return write_assets(directory) if assets else directory


def write_released(directory: Path) -> Path:
    """The FlashAR authors' directory: m = 1, one vertical layer, no prompt assets."""
    directory.mkdir(parents=True, exist_ok=True)
    model = ReleasedFlashAR(backbone(), 1, 1)
    with torch.no_grad():
        for parameter in (*model.vertical.parameters(), *model.dual_head.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file(model.to_released(), directory / "model.safetensors")
    values = {"model_type": MODEL_TYPE, "use_vertical_block": True, "vertical_layers": 1, "vertical_start_layer": 1}
    inner = hf_config(model.backbone.config)
    (directory / "config.json").write_text(json.dumps({**values, "backbone_config": inner}))
    return directory


def write_ibq(directory: Path) -> Path:
    """The golden image tokenizer as BAAI publishes it."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(IBQ_GOLDEN / "ibq_tiny_state.safetensors", directory / "model.safetensors")
    settings = json.loads((IBQ_GOLDEN / "ibq_tiny.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings["ddconfig"]))
    return directory


def write_images(folder: Path, count: int, start: int, name: str) -> None:
    """Coloured shapes with captions that say what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(start)
    items = []
    for i in range(start, start + count):
        colour, shape = list(COLOURS)[i % 3], ("square", "circle")[i // 3 % 2]
        image = Image.new("RGB", (160, 40) if i % WIDE == 0 else (44, 40), "white")
        x, y = random.integers(2, 14, 2)
        draw = ImageDraw.Draw(image)
        (draw.rectangle if shape == "square" else draw.ellipse)([x, y, x + 20, y + 20], fill=COLOURS[colour])
        image.save(folder / f"{i}.png")
        items.append({"caption": f"a {colour} {shape}", "image": f"{i}.png"})
    (folder / f"{name}.json").write_text(json.dumps(items))
