"""Networks of transformers from a local directory, which is data: its code is not run, its pickles are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashar_pl.console import needing
from flashar_pl.text_files import BROKEN, need_file, reason

LARGEST_POINTER = 1024
"""Bytes of a file that stands for another, at most, as Git LFS has it."""


def pretrained(kind: str, directory: str | Path, example: str, what: str, extra: str = "emu", **options: Any) -> Any:
    """What the class `kind` of transformers makes of a directory.

    example: a repository of huggingface.co with such a directory. what: the network is, for messages. extra: what to
    install for it.

    Raises:
        ValueError: the directory holds no such thing, or transformers is not installed.
    """
    place = Path(directory).expanduser()
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{place} holds no {what}: config.json is missing. Give a local copy of huggingface.co/{example}; nothing "
            "is downloaded for you."
        )
    for file in place.iterdir():
        if file.is_file() and file.stat().st_size < LARGEST_POINTER:
            need_file(file)
    with needing(f"the {what}", extra):
        import transformers
        from safetensors import SafetensorError
    if not kind.endswith("Tokenizer"):
        options["use_safetensors"] = True
    try:
        loader = getattr(transformers, kind)
        return loader.from_pretrained(place, local_files_only=True, trust_remote_code=False, **options)
    except (*BROKEN, SafetensorError) as error:
        raise ValueError(
            f"{place} holds no {what} that can be read ({reason(error)}); expected the files of {example}, the weights "
            "as safetensors."
        ) from error
