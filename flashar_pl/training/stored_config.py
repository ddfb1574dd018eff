"""The configuration inside a checkpoint, and what a continued run changes about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.mark import own
from flashar_pl.models.lora import LoraConfig
from flashar_pl.text_files import flatten, parse_yaml, read_text

CONFIG_KEY = "flashar_config"
"""Key of the configuration (YAML text) inside a Lightning checkpoint."""
CONFIG_FILE = "config.yaml"
"""Name of the configuration in a run directory."""


def read_config(path: str) -> dict[str, Any]:
    """The configuration stored in a Lightning checkpoint, without the options of one call. {} if it has none.

    Raises:
        ValueError: the file is no checkpoint of ours.
    """
    return _settings(RunCheckpoint(path).content.get(CONFIG_KEY, "{}"), path)


def own_config(path: str) -> dict[str, Any] | None:
    """The configuration of the run directory in which a checkpoint is, if a command of this user's wrote it."""
    file = config_beside(path)
    text = own(file.read_text(encoding="utf-8", errors="surrogateescape")) if file is not None else None
    return None if text is None else _settings(text, str(file))


def config_beside(path: str) -> Path | None:
    """config.yaml of the run directory in which a checkpoint is; None = there is none."""
    folder = Path(path).absolute().parent
    file = folder.parent / CONFIG_FILE
    return file if folder.name == "checkpoints" and file.is_file() else None


def read_settings(file: Path) -> dict[str, Any]:
    """What config.yaml of a run directory says, whoever wrote it."""
    return _settings(read_text(file), str(file))


def _settings(text: Any, path: str) -> dict[str, Any]:
    """YAML text as settings of a run, without the options of one call. ValueError where it is none."""
    stored = parse_yaml(text, f"the configuration in {path}") if isinstance(text, str) else None
    if not isinstance(stored, dict):
        raise ValueError(f"the configuration in {path} has no keys; give the run's YAML: --config FILE.")
    return {str(key): value for key, value in stored.items() if key not in ("config", "ckpt_path")}


def check_same_data(path: str, name: str, grid: tuple[int, int]) -> None:
    """ValueError if a checkpoint was trained on another grid than that of the data set `name`."""
    stored = RunCheckpoint(path).description.grid
    if stored is not None and tuple(stored) != tuple(grid):
        raise ValueError(
            f"{path} was trained on a grid of {stored[0]} x {stored[1]} codes, the shards of {name!r} have "
            f"{grid[0]} x {grid[1]}. Give shards of that grid: --data.shards."
        )


def check_same_model(path: str, config: dict[str, Any], lora: LoraConfig | None = None) -> None:
    """ValueError if a checkpoint holds another model than `config` (the argument of `build_model`) and `lora` describe.

    LoRA's dropout and the dtype of its frozen weights may differ.
    """
    description = RunCheckpoint(path).description
    stored, now = flatten(description.model), flatten(config)
    wrong = [
        f"{key} {stored[key]!r} (this run: {value!r})"
        for key, value in now.items()
        if value not in (None, stored.get(key)) and stored.get(key) is not None and not key.endswith("dropout")
    ]
    before, after = (
        {key: value for key, value in (values or {}).items() if key in ("rank", "alpha", "targets")}
        for values in (description.lora, lora and lora.to_dict())
    )
    if before != after:
        wrong.append(f"lora {before or None} (this run: {after or None})")
    if wrong:
        raise ValueError(
            f"{path} holds another model: {'; '.join(wrong)}. Continue it with its own settings, or start a new run "
            "from its weights with --model.init_from."
        )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines "key: old -> new" for what differs between two nested configurations."""
    old, new = flatten(before), flatten(after)
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
