"""`flashar convert`: official, Lightning and our own checkpoints into one another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.files import require_new
from flashar_pl.options import DeviceOptions, ModelOptions

if TYPE_CHECKING:
    from flashar_pl.checkpoints.opening import Source


@dataclass(frozen=True)
class ConvertOptions:
    """Result"""

    out: str
    """Where to write; must not exist. With --to official a name ending in .pt or .safetensors, or a directory."""
    to: Literal["flashar", "official"] = "flashar"
    """Our directory format (flashar), or the names of the official weights (official)."""
    original: str | None = None
    """With --to official, the official directory the model came from: its config.json and the text rows of its heads,
    which decoding does not need, are taken from there. Default: the checkpoint itself, if it is one."""


def convert(model: ModelOptions, /, options: ConvertOptions) -> Path:
    """Convert a checkpoint, bit for bit.

    Reads official files (.pt, .safetensors), Lightning checkpoints, converted and released directories. Writes a
    directory with config.json and model.safetensors that loads by its path alone, or official weights again. --grid and
    --tokenizer are noted in the result where the source does not say them. Prints the architecture and the number of
    parameters.

    Example:
        flashar convert c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --out models/llamagen-b
        flashar convert runs/flashar/checkpoints/last.ckpt --out models/flashar
        flashar convert models/llamagen-b --to official --out c2i_B_again.pt
    """
    from flashar_pl.checkpoints.official import FILE_SUFFIXES, write_official
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.checkpoints.weights import save_model

    target = require_new(options.out, "converted checkpoint")
    if options.to == "flashar" and target.suffix in FILE_SUFFIXES:
        raise ValueError(
            f"--out {target} names a file; our format is a directory, such as --out {target.with_suffix('')}."
        )
    read = open_checkpoint(model, DeviceOptions("cpu"), stored=True)
    if options.to == "official":
        target = write_official(target, read.model, read.path, options.original)
    else:
        note = replace(read.description, model=read.model.config(), grid=read.grid, tokenizer=read.tokenizer)
        save_model(target, read.model, note)
    print(describe(read))
    decoder = (read.tokenizer or {}).get("weights")
    if decoder in read.description.strange:
        print(f"note: {read.path} names {decoder!r} as its tokenizer, to be typed where it is used.", file=sys.stderr)
    elif decoder is not None and not Path(str(decoder)).expanduser().exists():
        print(f"note: nothing is at {decoder} now; the model will look for its tokenizer there.", file=sys.stderr)
    print(f"wrote {target}")
    return target


def describe(source: Source) -> str:
    """What was read, in a few lines."""
    config = source.model.config()
    backbone: dict[str, Any] = config["backbone"]
    parameters = sum(p.numel() for p in source.model.parameters())
    own = source.model.backbone
    kind = {"prompt": "token ids"}.get(own.conditioning.kind, own.conditioning.kind)
    shape = (
        f"dim {own.dim}, n_layer {own.n_layer}, n_head {own.block.n_head}, n_kv_head {own.block.n_kv_head}, "
        f"vocab_size {backbone['vocab_size']}"
    )
    lines = [
        f"{source.path}: {source.kind}",
        f"  model       {config['kind']}, {parameters:,} parameters, {next(source.model.parameters()).dtype}",
        f"  backbone    {backbone['kind']}: {shape}, condition {kind}",
    ]
    if config["kind"] == "flashar":
        keys = ("branch_layer", "vertical_layers", "fusion", "corner")
        lines.append("  FlashAR     " + ", ".join(f"{key} {config[key]}" for key in keys))
    lines.append(f"  grid        {'not known' if source.grid is None else f'{source.grid[0]} x {source.grid[1]}'}")
    lines.append(f"  tokenizer   {source.tokenizer or 'not known'}")
    return "\n".join(lines)
