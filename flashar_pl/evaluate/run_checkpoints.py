"""Every kept checkpoint of a training run, measured one after the other in the same way."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.evaluate.identity import path_digest
from flashar_pl.evaluate.options import MEASURED, Evaluation
from flashar_pl.evaluate.parts import RESULT
from flashar_pl.evaluate.run import evaluate_on_rank, settings_of
from flashar_pl.files import write_json
from flashar_pl.ranks import Rank
from flashar_pl.text_files import read_field, read_json


def evaluate_checkpoints(asked: Evaluation, threads: int, rank: Rank) -> dict[str, Any] | None:
    """One rank's work; the first rank returns what checkpoints.json holds, ascending in steps.

    A checkpoint that was measured in the same way is not measured again. The file is written after each of them.
    """
    run = Path(asked.options.run or "").expanduser()
    out = Path(asked.options.out or run / Path(MEASURED).parent)
    file = out / Path(MEASURED).name
    listed = rank.first(lambda: [(step, str(path)) for step, path in kept_checkpoints(run)])
    each = []
    for step, path in listed:
        options, model = replace(asked.options, run=None, out=str(out / f"step_{step:07d}")), asked.model
        each.append((step, replace(asked, options=options, model=replace(model, checkpoint=path))))
    rank.first(lambda: check_same(file, asked))
    done = rank.first(lambda: [finished(one) for _, one in each])
    entries = []
    for (step, one), result in zip(each, done, strict=True):
        if result is None:
            if rank.rank == 0:
                print(f"step {step}: {one.model.checkpoint}", file=sys.stderr)
            result = evaluate_on_rank(one, threads, rank)
        if result is not None and rank.rank == 0:
            entries.append({"step": step, "checkpoint": one.model.checkpoint, "metrics": result["metrics"]})
            write_json(file, {"settings": _shared(asked), "checkpoints": entries})
    return {"checkpoints": entries, "out": str(out)} if rank.rank == 0 else None


def kept_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(completed steps, path) of the checkpoints below checkpoints/, ascending; one for each step.

    Raises:
        ValueError: there is none, or one is damaged.
    """
    paths = [path for path in sorted((run / "checkpoints").glob("*.ckpt")) if path.name[0] != "."]
    if not paths:
        raise ValueError(f"--run {run}: no *.ckpt in {run / 'checkpoints'}; expected the directory of a `flashar fit`.")
    found: dict[int, Path] = {}
    for path in paths:
        found.setdefault(int(RunCheckpoint(path).content["global_step"]), path)
    return sorted(found.items())


def check_same(file: Path, asked: Evaluation) -> None:
    """ValueError where an earlier call measured with other settings (which)."""
    stored = read_field(file, "settings", dict) if file.is_file() else {}
    wanted = json.loads(json.dumps(_shared(asked)))
    other = {name: value for name, value in wanted.items() if stored.get(name) != value}
    if stored and other:
        listed = ", ".join(f"{name} {stored.get(name)!r} (now {value!r})" for name, value in other.items())
        raise ValueError(f"{file} was measured with {listed}; choose another --out, or remove {file.parent}.")


def finished(asked: Evaluation) -> dict[str, Any] | None:
    """The result of an earlier call. None = there is none.

    Raises:
        ValueError: it is of another checkpoint.
    """
    file = Path(asked.options.out or "") / RESULT
    if not file.is_file():
        return None
    read_field(file, "metrics", dict)
    if read_field(file, "samples", dict).get("checkpoint_sha256") != path_digest(asked.model.checkpoint):
        raise ValueError(
            f"{file} is of another checkpoint than {asked.model.checkpoint}; choose another --out, or remove "
            f"{file.parent}."
        )
    return read_json(file)


def _shared(asked: Evaluation) -> dict[str, Any]:
    """Settings that all checkpoints of a run are measured with."""
    return {name: value for name, value in settings_of(asked).items() if name != "checkpoint"}
