"""Networks of transformers from a local directory, which is data: its code is not run, its pickles are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashar_pl.console import needing
from flashar_pl.text_files import BROKEN, need_file, read_json, reason

LARGEST_POINTER = 1024
"""Bytes of a file that stands for another, at most, as Git LFS has it."""


DEEP = ("layers", "blocks", "depth", "depths", "multiplier")
"""How the fields of a configuration end that say how many parts are built, one by one; they may be lists."""
DEEPEST = 1000
"""Parts of a network; published ones have a hundred."""


def check_depth(values: Any, name: str = "config.json", counts: bool = False) -> None:
    """ValueError for a configuration that would build parts for ever, before it is compared with any tensor.

    values: of a file. counts: they say how many parts there are.
    """
    if counts and (len(values) if isinstance(values, list) else values if isinstance(values, int) else 0) > DEEPEST:
        raise ValueError(f"{name} is {str(values)[:40]}; expected at most {DEEPEST:,} parts.")
    if isinstance(values, dict):
        for key, value in values.items():
            check_depth(value, f"{name}: {key}", str(key).endswith(DEEP))
    elif isinstance(values, list):
        for value in values:
            check_depth(value, name, counts)


def refused() -> tuple[type[Exception], ...]:
    """What transformers raises for a directory that it cannot read."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (*BROKEN, SafetensorError, StrictDataclassError)


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
    if not kind.endswith("Tokenizer"):
        options["use_safetensors"] = True
    try:
        check_depth(read_json(place / "config.json"))
        loader = getattr(transformers, kind)
        return loader.from_pretrained(place, local_files_only=True, trust_remote_code=False, **options)
    except refused() as error:
        raise ValueError(
            f"{place} holds no {what} that can be read ({reason(error)}); expected the files of {example}, the weights "
            "as safetensors."
        ) from error
