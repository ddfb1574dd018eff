"""The files of a tokenising job: finished parts while it runs, and the merge at its end. See `tokenise.py`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.data.images import Unreadable
from flashar_pl.data.manifest import FILE_NAME, SPLITS, Manifest

if TYPE_CHECKING:
    from flashar_pl.data.tokenise import Job

MERGE_WAITS = (0.5, 2.0)
"""Seconds to wait for another process that is merging."""
NAMED = 5
"""Unreadable samples named in an error."""


def part_folder(job: Job, part: int) -> Path:
    """Where a finished part lies."""
    return job.work / f"{part:06d}"


def report_path(job: Job) -> Path:
    """The report; it exists once the split is complete."""
    return job.out / f"tokenize-{job.split}.json"


def manifests(out: Path) -> list[Path]:
    """The manifests of a directory made by a job: its own, or one in each sub-folder."""
    return [path for path in (out / FILE_NAME, *sorted(out.glob(f"*/{FILE_NAME}"))) if path.is_file()]


def finished_parts(job: Job) -> set[int]:
    """Numbers of the finished parts. One listing: network file systems answer it freshly, single look-ups not."""
    try:
        names = os.listdir(job.work)
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if name.isdigit()}


def start(job: Job) -> dict[str, Any] | None:
    """Make the working directory, or find the one of an earlier run. Returns the report if all is done already.

    Raises:
        ValueError: `out` holds something else, or an earlier run of this split had other settings.
    """
    report = _complete(job)
    if report is not None:
        return report
    try:
        _check_output(job)
    except ValueError:
        report = _complete(job)  # another process may have finished since
        if report is None:
            raise
        return report
    job.work.mkdir(parents=True, exist_ok=True)
    settings = job.work / "job.json"
    if not settings.exists():
        write_json(settings, job.identity())
    report = _complete(job)  # before the settings are read: another process may have finished and removed them
    if report is None:
        _compare(job, read_json(settings), "was begun")
    return report


def _complete(job: Job) -> dict[str, Any] | None:
    """The report if the split is complete; removes what is left of the work. Raises ValueError for other settings."""
    if not report_path(job).exists():
        return None
    report = read_json(report_path(job))
    _compare(job, report["settings"], "is complete, but was made")
    shutil.rmtree(job.work, ignore_errors=True)
    return report


def _check_output(job: Job) -> None:
    """Raises ValueError if `out` holds something that this job must not or cannot join."""
    found = manifests(job.out)
    unfinished = any((job.out / f".{split}").is_dir() for split in SPLITS)
    if job.out.exists() and not found and not unfinished and any(job.out.iterdir()):
        raise ValueError(f"{job.out} exists and holds no shards; nothing was written. Choose another --out.")
    for path in found:
        _check_addition(job, Manifest.load(path), job.work.is_dir())
    _check_weights(job)


def new_part(job: Job, part: int) -> Path:
    """An empty directory for a part that is being written; what a killed run left there is removed."""
    place = job.work / f".{part:06d}.partial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def commit_part(job: Job, part: int, place: Path, bad: list[dict[str, Any]]) -> None:
    """Declare a part finished."""
    write_json(place / "part.json", {"samples": len(job.samples(part)), "bad": bad})
    place.rename(part_folder(job, part))


def read_part(job: Job, part: int) -> dict[str, Any]:
    """What `commit_part` wrote."""
    return read_json(part_folder(job, part) / "part.json")


def retry_bad(job: Job, parts: Iterable[int]) -> None:
    """Forget finished parts of which an unreadable sample can be read now: a disk may have been away."""
    for part in finished_parts(job).intersection(parts):
        if any(_readable(job, bad["id"]) for bad in read_part(job, part)["bad"]):
            shutil.rmtree(part_folder(job, part))


def check_share(job: Job, bad: int, examples: list[dict[str, Any]]) -> None:
    """Raises ValueError if `bad` unreadable samples are more than the job allows."""
    allowed = job.max_bad_share * len(job.source)
    if bad > allowed:
        listed = "".join(f"\n  {entry['where']}: {entry['reason']}" for entry in examples[:NAMED])
        raise ValueError(
            f"{bad} of {len(job.source)} samples cannot be read, more than the share of {job.max_bad_share} that "
            f"--max-bad-share allows. Repair them or raise it, and run the same command again: it continues.{listed}"
        )


def finish(job: Job) -> dict[str, Any] | None:
    """Merge the parts if all are finished. Returns the report, or None if some part is not finished yet.

    Several processes may do this at once: each writes the same files, and the report is written last.

    Raises:
        ValueError: more unreadable samples than allowed, or no sample at all.
    """
    if len(finished_parts(job)) < job.parts:
        return read_json(report_path(job)) if report_path(job).exists() else None
    for wait in (*MERGE_WAITS, None):
        try:
            return _merge(job)
        except (FileNotFoundError, ValueError) as error:
            if report_path(job).exists():  # another process has merged and removed them
                return read_json(report_path(job))
            if wait is None or not isinstance(error, FileNotFoundError):
                raise
            time.sleep(wait)  # another process is about to
    raise AssertionError


def _merge(job: Job) -> dict[str, Any]:
    bad = [entry for part in range(job.parts) for entry in read_part(job, part)["bad"]]
    check_share(job, len(bad), bad)
    pieces: dict[str, list[Manifest]] = {}
    for part in range(job.parts):
        for path in manifests(part_folder(job, part)):
            pieces.setdefault(path.parent.name, []).append(Manifest.load(path))
    written = sum(manifest.samples(job.split) for group in pieces.values() for manifest in group)
    if written + len(bad) != len(job.source):  # another process has begun to remove the parts
        raise FileNotFoundError(f"{job.work} holds {written} samples and {len(bad)} unreadable ones.")
    if not written:
        raise ValueError(f"None of the {len(job.source)} samples can be read, so there is nothing to put at {job.out}.")
    assert job.grid is None or len(pieces) == 1, list(pieces)
    grids = {}
    for name, group in sorted(pieces.items()):
        target = job.out / name if job.grid is None else job.out
        manifest = _merge_grid(job, target, group)
        grids[name] = manifest.samples(job.split)
    bad.sort(key=lambda entry: entry["id"])
    if bad:
        lines = "".join(f"{entry['id']}\t{entry['where']}\t{entry['reason']}\n" for entry in bad)
        path = job.out / f"bad_images.{job.split}.txt"
        _replace(path, lines)
    report = {
        "split": job.split,
        "samples": len(job.source),
        "written": written,
        "unreadable": len(bad),
        "left_out": job.source.skipped,
        "grids": grids,
        "settings": job.identity(),
    }
    write_json(report_path(job), report)
    shutil.rmtree(job.work, ignore_errors=True)
    return read_json(report_path(job))


def _merge_grid(job: Job, target: Path, group: list[Manifest]) -> Manifest:
    """Move the tars of one grid to `target` and write its manifest, keeping other splits that are there."""
    target.mkdir(parents=True, exist_ok=True)
    shards = tuple(shard for manifest in group for shard in manifest.shards(job.split))
    for manifest in group:
        for shard in manifest.shards(job.split):
            source, goal = Path(manifest.root) / shard.path, target / shard.path
            try:
                source.replace(goal)
            except FileNotFoundError:
                if not goal.exists():  # moved already, by a killed run or another process
                    raise
    splits = {}
    if (target / FILE_NAME).exists():
        present = Manifest.load(target)
        _check_addition(job, present, overwrite=True)
        splits = present.splits
    splits = {
        split: shards if split == job.split else splits[split] for split in SPLITS if split in {*splits, job.split}
    }
    replace(group[0], splits=splits, evaluation_crop=job.evaluation_crop).save(target)
    return Manifest.load(target)


def _check_addition(job: Job, present: Manifest, overwrite: bool) -> None:
    """Raises ValueError unless this job's split can join the shards that are there."""
    if job.split in present.splits and not overwrite:
        raise ValueError(
            f"{present.root} has a {job.split} split already; nothing was written. Remove it, or choose another --out "
            "or --split."
        )
    condition = job.source.condition
    new = {
        "tokenizer": without_path(job.tokenizer),
        "vocabulary": job.vocabulary,
        "crops": job.crops,
        "condition": condition,
    }
    if job.grid is not None:
        new["grid"] = job.grid
    for name, value in new.items():
        there = without_path(present.tokenizer) if name == "tokenizer" else getattr(present, name)
        if there != value:
            raise ValueError(
                f"{present.root} has {name} {there}, this job makes {value}; both splits must agree. "
                "Choose another --out, or the same settings."
            )


def without_path(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config without the place of its weights, which may move; their hash is compared instead."""
    return {name: value for name, value in tokenizer.items() if name != "weights"}


def _check_weights(job: Job) -> None:
    """Raises ValueError if another split at `out` was made with other weights."""
    own = job.settings.get("weights_hash")
    for split in SPLITS:
        path = job.out / f"tokenize-{split}.json"
        other = read_json(path)["settings"].get("weights_hash") if path.exists() else None
        if own is not None and other is not None and own != other:
            raise ValueError(
                f"The {split} split at {job.out} was made with other weights of the tokenizer than this command has. "
                "Use the same file, or choose another --out."
            )


OPTIONS = {"part": "--shard-images"}
"""How settings are typed whose names in the files are others."""


def _compare(job: Job, then: dict[str, Any], how: str) -> None:
    now = json.loads(json.dumps(job.identity()))
    if changed := [name for name in now if name not in then or then[name] != now[name]]:
        name = changed[0]
        raise ValueError(
            f"The {job.split} split at {job.out} {how} with {OPTIONS.get(name, name)} = "
            f"{then.get(name)!r}; this command has {now[name]!r}. Use the old settings, or choose another --out."
        )


def _readable(job: Job, number: int) -> bool:
    try:
        job.prepare(job.source.read(number)[0])
    except Unreadable:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it."""
    _replace(path, json.dumps(values, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    # A random name: processes in containers on several machines often have the same number.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    partial.replace(path)
