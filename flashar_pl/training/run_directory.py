"""The directory of a run: one process at a time, and the same command goes on where it was stopped."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashar_pl import locks
from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.checkpoints.verify import by_age, newest_whole
from flashar_pl.files import naming_full_disk
from flashar_pl.integrity import Damaged
from flashar_pl.training.stored_config import CONFIG_FILE, differences, flatten, read_settings

LOCK = ".lock"
"""File of a run directory that the process in it has locked, with its name."""
NO_WORK = ("events.out.tfevents.", "hparams.yaml", f".{CONFIG_FILE}.")
"""How the files begin that a run makes before it has its config.yaml."""
NO_POINT = 128
"""Bytes of the longest file of curves that has no point."""
PLACE = (
    *("trainer.default_root_dir", "trainer.devices", "trainer.num_nodes", "trainer.strategy.init_args.replicas"),
    "trainer.strategy.init_args.background",
    *("data.num_workers", "data.init_args.num_workers"),
)
"""Settings that say where a run is computed, not what: a run continues with others."""


@contextmanager
def only_one(directory: Path, new: bool = False) -> Iterator[None]:
    """Keep other fits out of a run directory until this one ends, in whatever way. new: there was nothing in it.

    Raises:
        ValueError: another process is in it, or was.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locks.lock_file(directory / LOCK) as file:
        try:
            locks.take(file, alone=True)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"the run directory {directory} is in use by {file.read().strip() or 'another process'}; wait for it, "
                "or choose another --trainer.default_root_dir."
            ) from error
        if new and is_used(directory):
            raise ValueError(f"another process made the run directory {directory} meanwhile; start again.")
        with naming_full_disk(directory / LOCK):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def is_used(directory: Path) -> bool:
    """Whether there is anything in a directory but the lock and what a run leaves that had not its config.yaml yet."""
    return directory.is_dir() and not all(path.name == LOCK or _holds_no_work(path) for path in directory.iterdir())


def _holds_no_work(path: Path) -> bool:
    begun = path.name.startswith(NO_WORK) and path.is_file()
    return begun and (path.suffix == ".part" or path.stat().st_size <= NO_POINT)


def check_own(directory: Path, checkpoint: str) -> None:
    """ValueError if a run that continues from a checkpoint would write into another run's directory."""
    if is_used(directory) and directory.resolve() not in Path(checkpoint).resolve().parents:
        raise ValueError(
            f"the run directory {directory} holds another run than {checkpoint}; choose a new "
            "--trainer.default_root_dir."
        )


def continued(directory: Path, values: dict[str, Any], typed: Collection[str] = ()) -> str | None:
    """The checkpoint from which a command goes on in its run directory; None = it has none yet, so the run begins.

    values: what the command would run, as config.yaml has it. typed: keys that the user gives; others that config.yaml
    lacks are new in this version, and have their defaults.

    Raises:
        ValueError: the directory holds something else, a run of other settings (which), or checkpoints none of which
            is whole: a run that has lost them must not begin again in silence.
    """
    if not is_used(directory):
        return None
    other = "choose another --trainer.default_root_dir, or remove it"
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(
            f"the run directory {directory} exists, without the {CONFIG_FILE} of a run; nothing was written: {other}."
        )
    folders = [directory / "checkpoints", *_other_folders(values)]
    found = newest(folders)
    stored = read_settings(directory / CONFIG_FILE)
    skipped = {*PLACE, *(flatten(values).keys() - flatten(stored).keys() - set(typed))}
    changed = [line for line in differences(stored, values) if line.partition(":")[0] not in skipped]
    if changed:
        how = f"to change them, continue it with --checkpoint {found} and these options; or " if found else ""
        raise ValueError(
            f"the run directory {directory} exists, and its run has other settings than this command: "
            f"{'; '.join(changed)}. Nothing was written: {how}{other}."
        )
    if found is None and (left := [path for folder in folders if folder.is_dir() for path in folder.iterdir()]):
        raise ValueError(
            f"the run directory {directory} has no whole checkpoint, but {left[0]}; nothing was written. To begin "
            f"again, {other}."
        )
    return found


def newest(folders: list[Path]) -> str | None:
    """The newest checkpoint in some folders from which a run can continue; its tensors are compared when it does.

    Raises:
        ValueError: it cannot be read; the newest whole one is named.
    """
    ordered = by_age(folders)
    for i, path in enumerate(ordered):
        try:
            if "callbacks" in RunCheckpoint(path).content:  # else it has weights only
                return str(path)
        except ValueError as error:
            whole = None if isinstance(error, Damaged) else newest_whole(ordered[i + 1 :])  # else it is named already
            hint = "" if whole is None else f" To continue from the newest whole one: --checkpoint {whole}"
            raise ValueError(f"{error}{hint}") from error
    return None


def is_finished(checkpoint: str) -> bool:
    """Whether a run has done all its steps."""
    stored = RunCheckpoint(checkpoint)
    return stored.content["global_step"] == stored.description.training.get("total_steps")


def _other_folders(values: dict[str, Any]) -> list[Path]:
    """Where the callbacks of a configuration keep checkpoints, if they say it."""
    callbacks = values["trainer"].get("callbacks") or []
    settings = [each.get("init_args") or {} for each in callbacks if isinstance(each, dict)]
    return [Path(each["dirpath"]).expanduser() for each in settings if each.get("dirpath")]


def where_to_continue(step: int, folders: Iterable[str]) -> str:
    """What a run that is interrupted at a step has kept in its folders of checkpoints."""
    kept, here = by_age(folders), Path.cwd()
    if not kept:
        return f"Interrupted at step {step}, before the first checkpoint."
    newest = kept[0].relative_to(here) if kept[0].is_relative_to(here) else kept[0]
    checkpoint = shlex.quote(str(newest))
    return f"Interrupted at step {step}. Continue with the same command, or with: flashar fit --checkpoint {checkpoint}"
