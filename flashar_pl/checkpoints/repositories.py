"""Checkpoints named as a repository of huggingface.co: from its cache, and fetched only where that is asked for."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flashar_pl.console import needing
from flashar_pl.options import ModelOptions

Model = TypeVar("Model", bound=ModelOptions)

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)*")
"""owner/name, or owner/name/path/of/a/file."""
DATA_FILES = ("*.json", "*.safetensors", "*.tiktoken", "*.txt", "*.model")
"""What is fetched of a repository: weights, configurations and vocabularies, never code."""


def located(model: Model) -> Model:
    """The same options with a local path as checkpoint, and nothing left to download. Raises ValueError as `locate`."""
    return replace(model, checkpoint=locate(model.checkpoint, model.download), download=False)


def locate(path_or_repo: str, download: bool = False) -> str:
    """A local path: the one given, else where the Hub cache has the repository or its file.

    download: fetch what the cache lacks.

    Raises:
        ValueError: a repository that the cache does not hold, or that cannot be fetched.
    """
    path = Path(path_or_repo).expanduser()
    owner, *inside = path_or_repo.split("/")
    named = REPOSITORY.fullmatch(path_or_repo) and owner not in (".", "..", "~") and path.suffix != ".ckpt"
    if not named or path.exists() or Path(owner).exists():
        return str(path)
    with needing(f"{path_or_repo}, which is no local path and so a repository,", "hf"):
        import huggingface_hub
    repository, file = f"{owner}/{inside[0]}", "/".join(inside[1:])
    try:
        if file:
            return huggingface_hub.hf_hub_download(repository, file, local_files_only=not download)
        found = huggingface_hub.snapshot_download(
            repository, allow_patterns=list(DATA_FILES), local_files_only=not download
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        if not download:
            raise _miss(path_or_repo, f"the Hub cache ({_cache()}) does not hold it", repository) from error
        said = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"no checkpoint {path_or_repo}: no such file or directory, and as a repository of huggingface.co: {said} "
            "Expected the path of a checkpoint, OWNER/NAME, or OWNER/NAME/FILE."
        ) from error
    if not download and not any(Path(found).rglob("*.safetensors")):
        raise _miss(path_or_repo, f"the Hub cache ({_cache()}) holds it without its weights", repository)
    return found


def _miss(name: str, state: str, repository: str) -> ValueError:
    return ValueError(
        f"no checkpoint {name}: no such file or directory, and {state}. To fetch it: hf download {repository}, or add "
        "--download, in Python download=True."
    )


def _cache() -> str:
    """Directory of the Hub cache."""
    import huggingface_hub

    return str(huggingface_hub.constants.HF_HUB_CACHE)
