"""`flashar convert`: official, Lightning and our own checkpoints into one another."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashar_pl.checkpoints.opening import STORED, Source, open_checkpoint
from flashar_pl.commands.model_card import model_card, read_report
from flashar_pl.files import require_new, write_text
from flashar_pl.options import Weights

if TYPE_CHECKING:
    from torch import Tensor

FILE_SUFFIXES = (".pt", ".pth", ".safetensors")


def convert(
    source: str,
    /,
    *,
    out: str,
    to: Literal["flashar", "official"] = "flashar",
    weights: Weights = "auto",
    n_head: int | None = None,
    grid: str | None = None,
    tokenizer: str | None = None,
    original: str | None = None,
    report: str | None = None,
) -> Path:
    """Convert a checkpoint, bit for bit.

    Reads official LlamaGen, NAR and LlamaGen-FlashAR files (.pt, .safetensors), Lightning checkpoints and converted
    directories. Writes a directory with config.json, model.safetensors and a model card, README.md, that loads by its
    path alone, or an official file again. Emu3.5 models are read from official directories and become such again.
    Prints the architecture and the number of parameters.

    Example:
        flashar convert c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --out models/llamagen-b
        flashar convert runs/flashar/checkpoints/last.ckpt --report eval/evaluation.json --out models/flashar
        flashar convert models/llamagen-b --to official --out c2i_B_again.pt

    Args:
        source: the checkpoint to read.
        out: where to write; must not exist. With --to official a name ending in .pt or .safetensors, or a directory
            that will hold model.pt; for Emu3.5 the directory.
        to: our directory format (flashar), or official LlamaGen, NAR or Emu3.5 names (official).
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        n_head: attention heads; needed for official files of unpublished sizes.
        grid: code grid HEIGHTxWIDTH to note in the result, where the source does not say it.
        tokenizer: tokenizer to note in the result, such as vq16:FILE, where the source does not say it.
        original: with --to official, the official Emu3.5 directory the model came from: its config.json and the text
            rows of its heads, which decoding does not need, are taken from there. Default: SOURCE, if it is one.
        report: evaluation.json of flashar evaluate, for the model card.
    """
    from dataclasses import replace

    from flashar_pl.checkpoints.weights import save_model

    target = require_new(out, "converted checkpoint")
    if to == "flashar" and target.suffix in FILE_SUFFIXES:
        raise ValueError(
            f"--out {out} names a file; our format is a directory, such as --out {target.with_suffix('')}."
        )
    if to == "official" and report is not None:
        raise ValueError("--report is for the model card of a directory, which --to official does not write.")
    read = open_checkpoint(source, weights=weights, n_head=n_head, grid=grid, tokenizer=tokenizer, dtype=STORED)
    measured = None if report is None else read_report(report, read.model.config())
    if to == "official":
        target = write_official(target, read, original)
    else:
        note = replace(read.description, model=read.model.config(), grid=read.grid, tokenizer=read.tokenizer)
        save_model(target, read.model, note)
        write_text(target / "README.md", model_card(read, measured))
    print(describe(read))
    decoder = (read.tokenizer or {}).get("weights")
    if decoder is not None and not Path(str(decoder)).expanduser().exists():
        print(f"note: nothing is at {decoder} now; the model will look for its tokenizer there.", file=sys.stderr)
    print(f"wrote {target}")
    return target


def write_official(target: Path, read: Source, original: str | None) -> Path:
    """Write official weights as a file, or as a directory for Emu3.5. Returns what was written."""
    from flashar_pl.backbones.emu35 import Emu35
    from flashar_pl.checkpoints.directories import check_original, is_official_directory, write_directory
    from flashar_pl.checkpoints.weights import official_weights
    from flashar_pl.models import FlashAR

    if not isinstance(read.model.backbone, Emu35):
        if original is not None:
            raise ValueError("--original is for Emu3.5 models; leave it out.")
        tensors = official_weights(read.model)
        target = target if target.suffix in FILE_SUFFIXES else target / "model.pt"
        write_tensors(target, tensors)
        return target
    if target.suffix in FILE_SUFFIXES:
        raise ValueError(f"official Emu3.5 weights are a directory, such as --out {target.with_suffix('')}.")
    if original is None and is_official_directory(read.path):
        original = read.path
    if type(read.model) is FlashAR:
        read.model.to_nar()  # says why there is no official format for it
    if original is None:
        raise ValueError(
            f"{read.path} holds what decoding needs; add --original DIR, the official directory the model came from, "
            "for config.json and the text rows of the heads."
        )
    check_original(read.model, original)
    write_directory(target, official_weights(read.model, original), original)
    return target


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write an official state dict under a temporary name, then rename it."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        else:
            torch.save({"model": tensors}, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def describe(source: Source) -> str:
    """What was read, in a few lines."""
    config = source.model.config()
    backbone: dict[str, Any] = config["backbone"]
    parameters = sum(p.numel() for p in source.model.parameters())
    shape = ", ".join(f"{key} {backbone[key]}" for key in ("dim", "n_layer", "n_head", "n_kv_head", "vocab_size"))
    lines = [
        f"{source.path}: {source.kind}",
        f"  model       {config['kind']}, {parameters:,} parameters, {next(source.model.parameters()).dtype}",
        f"  backbone    {backbone['kind']}: {shape}, condition {backbone.get('condition', 'token ids')}",
    ]
    if config["kind"] == "flashar":
        keys = ("branch_layer", "vertical_layers", "fusion", "corner")
        lines.append("  FlashAR     " + ", ".join(f"{key} {config[key]}" for key in keys))
    lines.append(f"  grid        {'not known' if source.grid is None else f'{source.grid[0]} x {source.grid[1]}'}")
    lines.append(f"  tokenizer   {source.tokenizer or 'not known'}")
    return "\n".join(lines)
