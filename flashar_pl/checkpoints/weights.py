"""Models from any file, and our own format: a directory with `config.json`, `model.safetensors` (above 5 GB in shards,
with an index) and a card, as repositories of huggingface.co have them.

`config.json` has everything needed to build the model, plus grid and tokenizer. Lightning checkpoints carry the same
description under the key "flashar".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from flashar_pl.checkpoints.description import Description, build_on_meta, check_layers, lora_config
from flashar_pl.checkpoints.official import (
    is_official_directory,
    open_directory,
    read_directory,
    read_official_model,
)
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY, EMA_PREFIX, NET_PREFIX, RunCheckpoint, nearest
from flashar_pl.checkpoints.safetensors_files import INDEX, SINGLE, SafetensorsDirectory, weight_files, write_shards
from flashar_pl.checkpoints.sharing import card, gathered
from flashar_pl.checkpoints.verify import offering
from flashar_pl.files import new_directory, write_json, write_text
from flashar_pl.integrity import check_safetensors, check_torch_file
from flashar_pl.models.base import GridModel
from flashar_pl.models.lora import merge
from flashar_pl.options import Weights
from flashar_pl.renames import AVERAGED, official_state_dict
from flashar_pl.tensor_files import is_sharded, read_tensors
from flashar_pl.text_files import naming, read_json

OFFICIAL_FILE = "official file"
"""What a file without a configuration is called, with the choice of weights where it has a choice."""


@dataclass
class Loaded:
    """A model read from a file."""

    model: GridModel
    description: Description
    source: str
    """What kind of file it was, for messages."""


def save_model(
    directory: str | Path,
    model: GridModel,
    description: Description,
    scores: Mapping[str, float] = MappingProxyType({}),
    self_contained: bool = False,
) -> None:
    """Write `config.json`, the weights and `README.md`; the directory must not exist. It appears complete or not at
    all.

    scores: metrics for the card. self_contained: copy the tokenizer, and what turns prompts into tokens, into it.
    Raises ValueError where they are not there.
    """
    with new_directory(directory, "model") as part:
        if self_contained:
            description = gathered(description, part)
        config = write_json(part / "config.json", description.to_dict())
        write_shards(part, model.state_dict(), beside=[config])
        write_text(part / "README.md", card(Path(directory).name, model, description, scores))


def load_model(
    path: str | Path,
    weights: Weights = "auto",
    n_head: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """A model from any file: our directory, a Lightning checkpoint (one file or shards), an official LlamaGen or
    NAR file, or an Emu3.5 directory.

    weights concerns files that may have averaged weights too. n_head is needed only for official files of unpublished
    sizes. device and dtype: official files and directories are read, tensor by tensor, straight to where they are used;
    the rest is read as it is stored.

    Raises:
        ValueError: the path does not exist, is none of these, or its keys and shapes do not fit.
    """
    path = Path(path)
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights is {weights!r}; expected auto, raw or ema.")
    with offering(path), naming(path):
        return _load(path, weights, n_head, device, dtype)


def _load(
    path: Path, weights: Weights, n_head: int | None, device: torch.device | str, dtype: torch.dtype | None
) -> Loaded:
    if is_official_directory(path):
        model = read_directory(path, "visual", device, dtype)
        description = Description(model=model.config(), tokenizer=open_directory(path).tokenizer)
        return Loaded(model, description, "official directory (visual heads)")
    if path.is_dir() and not is_sharded(path):
        if not (path / "config.json").exists() or not any((path / name).exists() for name in (SINGLE, INDEX)):
            raise ValueError(
                f"{path} holds no config.json and model.safetensors; expected a converted model.{nearest(path)}"
            )
        tensors = _converted(path, device, dtype)
        with naming(path / "config.json"):
            description = Description.from_dict(read_json(path / "config.json"))
            return Loaded(_fill(description, tensors), description, "converted model")
    content = {} if path.is_dir() else read_tensors(path, mmap=True, whole=False)
    if path.is_dir() or CHECKPOINT_KEY in content:
        run = RunCheckpoint(path)
        stored, kind = _stored_names(run.names(), weights, path)
        model = _fill(run.description, run.tensors(stored))
        return Loaded(model, run.description, f"{'sharded ' * run.sharded}checkpoint ({kind} weights)")
    check_torch_file(path)
    state, kind = official_state_dict(content, weights)
    model = read_official_model(state, n_head, content.get("args"), device, dtype)
    chosen = f"{OFFICIAL_FILE} ({kind} weights)" if AVERAGED in content else OFFICIAL_FILE
    return Loaded(model, Description(model=model.config(), grid=model.only_grid), chosen)


def _converted(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights of a directory of ours: left on the disk until they are used, where nothing is to be changed."""
    files = weight_files(path)
    for file in files:
        check_safetensors(file)
    source = SafetensorsDirectory(path)
    stored = {each.dtype for each in source.stored.values()}
    if (dtype is None or stored == {dtype}) and torch.device(device).type == "cpu":
        return {name: value for file in files for name, value in read_tensors(file).items()}
    found = {}
    for name in source.stored:
        value = source.whole(name)
        found[name] = value.to(device, dtype if value.is_floating_point() else None)
    return found


def _stored_names(names: Iterable[str], weights: Weights, path: Path) -> tuple[dict[str, str], str]:
    """(name of a model's tensor -> name of the wanted one in a Lightning checkpoint, "raw" or "ema").

    Of weights that never train a checkpoint holds no average.
    """
    names = list(names)
    raw = {name.removeprefix(NET_PREFIX): name for name in names if name.startswith(NET_PREFIX)}
    averaged = {name.removeprefix(EMA_PREFIX): name for name in names if name.startswith(EMA_PREFIX)}
    if weights == "ema" and not averaged:
        raise ValueError(f"{path} holds no averaged weights; use --weights raw.")
    return (raw | averaged, "ema") if averaged and weights != "raw" else (raw, "raw")


def _fill(description: Description, state: dict[str, Tensor]) -> GridModel:
    """The model of a description with these weights, not copied, low-rank updates merged. ValueError if they differ."""
    if description.lora is not None:
        state, description.lora = dict(merge(state, lora_config(description.lora))), None
    for name in ("n_layer", "depth", "code_layers"):
        check_layers(description.model.get("backbone"), name, len(state))
    model = build_on_meta(description.model)
    expected = model.state_dict()
    for key, value in state.items():
        if key in expected and expected[key].shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; this model expects {tuple(expected[key].shape)}.")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # missing or unexpected keys
        raise ValueError(f"the weights do not fit the model: {error}") from error
    return model.eval()
