"""What test_emu35_flashar.py asks of two ranks: a random sharded checkpoint, streamed into a model that they share."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from flashar_pl.backbones import Emu35
from flashar_pl.checkpoints.emu35 import backbone_renames
from flashar_pl.checkpoints.initialise import stream_weights
from flashar_pl.checkpoints.official import read_directory
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory
from flashar_pl.models import FlashAR

CONFIG = {
    "model_type": "Emu3", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 3001,  # odd, so that pieces of a fused projection cross the border between the ranks
    "vocab_size": 12001, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "eoi_token_id": 2000, "eol_token_id": 1999,
}  # fmt: skip
"""105 million parameters, 422 MB in float32."""


def backbone_on_meta() -> Emu35:
    from flashar_pl.checkpoints.emu35 import parse_config

    with torch.device("meta"):
        return Emu35(parse_config(CONFIG, "full"))


def write(directory: Path) -> None:
    """Four shards of random tensors, one at a time."""
    generator = torch.Generator().manual_seed(0)
    backbone = backbone_on_meta()
    shapes = {}
    for rename in backbone_renames(backbone.config):
        n, *columns = backbone.get_parameter(rename.ours).shape
        shapes.update({key: (rows, *columns) for key, rows in rename.split(n)})
    names = sorted(shapes)
    weight_map = {key: f"model-{1 + 4 * i // len(names):05d}-of-00004.safetensors" for i, key in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        tensors = {key: torch.randn(shapes[key], generator=generator) for key in names if weight_map[key] == file}
        save_file(tensors, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def read(directory: Path) -> dict[str, Any]:
    """Whether this rank got its rows, and sizes in bytes."""
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        model = FlashAR(backbone_on_meta(), 7)
    for block in (*model.backbone.blocks, *model.vertical.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.zeros(1).add_(1)
    reset_peak()
    before = peak_memory()
    stream_weights(model, directory)
    growth = peak_memory() - before
    parts = {name: p.to_local() for name, p in model.named_parameters()}  # type: ignore[operator]
    source = SafetensorsDirectory(directory)
    sizes = [4 * math.prod(source.shape(key)) for key in sorted(source.keys())]
    whole = dict(FlashAR(read_directory(directory, heads="full").backbone, 7).named_parameters())
    del whole["dual_head.gate.hidden.weight"]  # new values
    equal = all(
        torch.equal(parts[name], value.chunk(2)[rank]) if parts[name].numel() else rank == 1
        for name, value in whole.items()
    )
    return {
        "equal": equal,
        "meta": sum(p.is_meta for p in model.parameters()),
        "shard": sum(p.numel() * p.itemsize for p in parts.values()),
        "all": sum(p.numel() * p.element_size() for p in model.parameters()),
        "growth": growth,
        "largest": max(sizes),
        "file": sum(sizes),
    }
