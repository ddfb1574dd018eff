"""`flashar convert`: official, Lightning and our own checkpoints into one another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    self_contained: bool = False
    """Copy the tokenizer, and the directory that turns prompts into tokens, into the result, so that it draws images
    on any machine."""


def convert(model: ModelOptions, /, options: ConvertOptions) -> Path:
    """Convert a checkpoint, bit for bit.

    Reads official files (.pt, .safetensors), Lightning checkpoints, converted and released directories. Writes a
    directory that loads by its path alone and is what a repository of huggingface.co holds: config.json,
    model.safetensors (above 5 GB in shards, with an index) and a card, README.md; or official weights again. --grid and
    --tokenizer are noted in the result where the source does not say them. Prints the architecture and the number of
    parameters.

    Example:
        flashar convert c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --out models/llamagen-b
        flashar convert runs/flashar/checkpoints/last.ckpt --self-contained --out models/flashar
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
        if options.self_contained:
            raise ValueError("official weights have no place for a tokenizer; leave out --self-contained.")
        target = write_official(target, read.model, read.path, options.original)
    else:
        note = replace(read.description, model=read.model.config(), grid=read.grid, tokenizer=read.tokenizer)
        save_model(target, read.model, note, scores_of(read), options.self_contained)
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
    from flashar_pl.checkpoints.sharing import facts

    note = replace(source.description, model=source.model.config(), grid=source.grid, tokenizer=source.tokenizer)
    lines = facts(source.model, note)
    return "\n".join([f"{source.path}: {source.kind}", *(f"  {key:<11} {value}" for key, value in lines.items())])


def scores_of(source: Source) -> dict[str, float]:
    """What a run's checkpoint was kept for, by the metric's name; {} where it was kept for none, and of other files."""
    from flashar_pl.checkpoints.runs import RunCheckpoint

    if "checkpoint" not in source.kind:
        return {}
    states = RunCheckpoint(source.path).content.get("callbacks", {}).values()
    kept = [each for each in states if isinstance(each, dict) and each.get("current_score") is not None]
    return {str(each["monitor"]): float(each["current_score"]) for each in kept if each.get("monitor")}
