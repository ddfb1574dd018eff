"""A restartable job that turns the samples of a source into code shards, on any number of devices.

The samples are shuffled once by a fixed permutation and cut into *parts*; a part becomes one tar (one for each grid).
Every rank makes its share of the parts, and which samples meet in a pass of the tokenizer depends on the part alone, so
the result does not depend on the number of ranks. A part appears when it is finished: a killed job loses the parts it
was at, and the next start does those again. While it runs, the output directory holds

    .SPLIT/job.json                       settings; a restart with others is refused
    .SPLIT/000017/16x16/manifest.json     a finished part (its tar beside it), for each grid
    .SPLIT/000017/part.json               number of samples, and the unreadable ones

When every rank is done, the first one moves the tars out and writes manifest.json, then bad_images.SPLIT.txt and
tokenize-SPLIT.json (the report), then removes .SPLIT. That may be repeated from any point.

Shapes: n samples of one pass, K crops of an image, H x W grid.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashar_pl import locks
from flashar_pl.data.account import Account
from flashar_pl.data.encode import check_weights
from flashar_pl.data.items import Item, Items, Prepared
from flashar_pl.data.manifest import (
    FILE_NAME,
    SPLITS,
    Manifest,
    Shard,
    check_alike,
    check_names,
    sub_manifests,
    without_path,
)
from flashar_pl.data.order import permutation, stream
from flashar_pl.data.sources import Source
from flashar_pl.data.writer import ShardWriter
from flashar_pl.files import new_directory, write_json, write_text
from flashar_pl.options import ShardOptions
from flashar_pl.ranks import Rank
from flashar_pl.text_files import read_field, read_json

NAMED = 5
"""Unusable samples named in an error."""
LOCK = ".lock"
"""In the output directory, of the process that writes there."""
UNREADABLE = "unreadable or without a usable condition"
TOKENIZER = "tokenizer"
"""Folder of the output directory with a tokenizer that was trained for it."""
TYPED = {"part": "--shard-images"}
"""How settings are typed whose names in the files are others."""


@dataclass
class Job:
    """What to tokenise, how, and where to."""

    shards: ShardOptions
    source: Source
    prepare: Callable[[bytes], Prepared]
    """Bytes of a sample -> array whose last two axes tell its grid; runs in worker processes."""
    name: str
    """Of the data set."""
    tokenizer: dict[str, Any]
    vocabulary: int
    batch: int
    """n, at most."""
    settings: dict[str, Any]
    """What else decides the result; a restart must have the same."""
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    """Equal-sized arrays (n, ...) -> codes (n, K, H, W); None = they are codes already."""
    previews: Callable[[np.ndarray, tuple[int, int]], np.ndarray | None] = lambda arrays, grid: None
    """The same arrays and (H, W) -> codes (n, K, h, w) of smaller versions, for models that draw those first."""
    crops: int = 1
    """K."""
    grid: tuple[int, int] | None = None
    """(H, W) of every sample; None = grids differ, and each gets a data set of its own in OUT/HxW."""
    evaluation_crop: int = 0
    """Which crop evaluation takes."""
    preparation: dict[str, str] = field(default_factory=dict)
    """As in the manifest."""

    def __post_init__(self) -> None:
        self.order = np.arange(len(self.source))
        if not self.shards.keep_order:
            self.order = permutation(stream(0, 4), len(self.source))
        self.out, self.split = Path(self.shards.out), self.shards.split
        self.work = self.out / f".{self.split}"
        self.report = self.out / f"tokenize-{self.split}.json"
        self.parts = -(-len(self.source) // self.shards.shard_images)

    def samples(self, part: int) -> np.ndarray:
        """Numbers of the samples of a part."""
        size = self.shards.shard_images
        return self.order[part * size : (part + 1) * size]

    @property
    def facts(self) -> dict[str, Any]:
        """What its manifests say."""
        names = ("name", "tokenizer", "vocabulary", "crops", "evaluation_crop", "preparation")
        return {name: getattr(self, name) for name in names} | {"condition": self.source.condition}

    def identity(self) -> dict[str, Any]:
        """What a restart must agree on, as JSON gives it back."""
        values = {
            "name": self.name,
            "source": self.source.fingerprint(),
            "samples": len(self.source),
            "tokenizer": without_path(self.tokenizer),
            "crops": self.crops,
            "block": self.shards.block,
            "part": self.shards.shard_images,
            "shuffle": not self.shards.keep_order,
            **self.settings,
        }
        return json.loads(json.dumps(values))


def tokenise(build: Callable[[torch.device], Job], rank: Rank) -> dict[str, Any] | None:
    """Tokenise this rank's parts, starting where an earlier run stopped. Returns the report on the first rank.

    build: the job on this rank's device, the same on every rank.

    Raises:
        ValueError: an earlier run had other settings; the shards at `out` do not go with these; more unreadable
            samples than allowed; a label or code out of range.
    """
    job = build(rank.device)
    with ExitStack() as held:
        report = rank.first(partial(_begin, job, held))
        if report is None:
            _run_parts(job, rank, rank.first(partial(_finished, job)))
            rank.barrier()
            report = rank.first(partial(_merge, job))
    return report if rank.rank == 0 else None


# --- before ----------------------------------------------------------------------------------------------------------


def manifests(out: Path) -> list[Path]:
    """The manifests of a directory made by a job: its own, or one in each sub-folder."""
    own = out / FILE_NAME
    return [own] if own.is_file() else sub_manifests(out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a directory, which is made if needed. Raises ValueError where another process holds it."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    while True:
        lock = locks.lock_file(out / LOCK)
        try:
            locks.take(lock)
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"another flashar tokenize is writing to {out}. Let it finish, or choose another --out; to share the "
                "work among processes start them with torchrun or srun, as docs/cluster.md says."
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(out / LOCK)):
                break
        lock.close()  # the one before has just removed it
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        locks.release(lock)
        lock.close()
        with suppress(OSError):  # it holds something
            if made:
                out.rmdir()


def known_classes(out: str) -> tuple[str, ...]:
    """Class names of the shards that are at `out` already; their other splits must have the same."""
    path = Path(out) / FILE_NAME
    return Manifest.load(path).class_names if path.is_file() else ()


def _begin(job: Job, held: ExitStack) -> dict[str, Any] | None:
    """Make the working directory, or find the one of an earlier run. Returns the report if all is done already.

    held: keeps other processes out while it is open.
    """
    held.enter_context(_alone(job.out))
    if job.report.exists():
        _compare(job, read_field(job.report, "settings", dict), "is complete, but was made")
        shutil.rmtree(job.work, ignore_errors=True)
        return read_json(job.report)
    found = manifests(job.out)
    unfinished = any((job.out / f".{split}").is_dir() for split in SPLITS)
    if not found and not unfinished and any(path.name not in (LOCK, TOKENIZER) for path in job.out.iterdir()):
        raise ValueError(f"{job.out} exists and holds no shards; nothing was written. Choose another --out.")
    for path in found:
        _check_addition(job, Manifest.load(path), job.work.is_dir())
    check_weights(job.out, job.settings.get("weights_hash"))
    check_names(job.source.class_names, job.source.condition.num_classes)
    items = Items(job.source, job.prepare)
    bad = job.source.known_bad()
    _check_share(job, len(bad), [_named(job, items.read(number)) for number in bad[:NAMED]])
    job.work.mkdir(parents=True, exist_ok=True)
    settings = job.work / "job.json"
    if not settings.exists():
        write_json(settings, job.identity())
    _compare(job, read_json(settings), "was begun")
    return None


def _compare(job: Job, then: dict[str, Any], how: str) -> None:
    """Raises ValueError unless an earlier run had the same settings."""
    for name, value in job.identity().items():
        if name not in then or then[name] != value:
            raise ValueError(
                f"The {job.split} split at {job.out} {how} with {TYPED.get(name, name)} = "
                f"{then.get(name)!r}; this command has {value!r}. Use the old settings, or choose another --out."
            )


def _check_addition(job: Job, present: Manifest, overwrite: bool) -> None:
    """Raises ValueError unless this job's split can join the shards that are there."""
    if job.split in present.splits and not overwrite:
        raise ValueError(
            f"{present.root} has a {job.split} split already; nothing was written. Remove it, or choose another --out "
            "or --split."
        )
    own = replace(present, **job.facts, grid=job.grid or present.grid, splits={}, class_names=job.source.class_names)
    there, made = (each.shared | {"grid": each.grid, "classes": each.class_names} for each in (present, own))
    advice = "both splits must agree. Choose another --out, or the same settings."
    check_alike(present.root, there, "this job makes", made, advice)


def _finished(job: Job) -> dict[int, int]:
    """Finished parts, and how many unreadable samples each has. One listing: network file systems answer it freshly.

    A part of which an unreadable sample can be read now is forgotten: a disk may have been away.
    """
    found, items = {}, Items(job.source, job.prepare)
    for part in sorted(int(name) for name in os.listdir(job.work) if name.isdigit()):
        bad = _bad_samples(job, part)
        if any(items.read(entry["id"]).array is not None for entry in bad):
            shutil.rmtree(job.work / f"{part:06d}")
        else:
            found[part] = len(bad)
    return found


def _bad_samples(job: Job, part: int) -> list[dict[str, Any]]:
    return read_field(job.work / f"{part:06d}" / "part.json", "bad", list)


# --- parts -----------------------------------------------------------------------------------------------------------


def _run_parts(job: Job, rank: Rank, finished: dict[int, int]) -> None:
    """Tokenise what is left of this rank's parts."""
    left = [part for part in rank.share(job.parts) if part not in finished]
    bad = sum(finished.values())
    numbers = [job.samples(part) for part in left]
    items = Items(job.source, job.prepare).each(numbers, job.shards.workers)
    with rank.progress(sum(map(len, numbers)), "images") as advance:
        for part in left:
            bad += _write_part(job, part, items, advance, bad)


def _write_part(job: Job, part: int, items: Iterator[Item], advance: Callable[[int], Any], bad_before: int) -> int:
    """Tokenise one part. Returns the number of unreadable samples in it."""
    writers: dict[tuple[int, int], ShardWriter] = {}
    waiting: dict[tuple[int, ...], list[Item]] = {}
    bad: list[dict[str, Any]] = []

    def flush(shape: tuple[int, ...], place: Path) -> None:
        group = waiting.pop(shape)
        arrays = np.stack([item.array for item in group if item.array is not None])
        codes = arrays if job.encode is None else job.encode(arrays)  # (n, K, H, W)
        grid = (int(codes.shape[-2]), int(codes.shape[-1]))
        given = [item.preview for item in group if item.preview is not None]
        previews = np.stack(given) if given else job.previews(arrays, grid)  # (n, K, h, w)
        preview = None if previews is None else (int(previews.shape[-2]), int(previews.shape[-1]))
        if grid not in writers:
            writers[grid] = ShardWriter(
                place / f"{grid[0]}x{grid[1]}", grid=grid, preview=preview, block=job.shards.block, first_shard=part,
                shard_blocks=-(-job.shards.shard_images // job.shards.block), **job.facts,
            )  # fmt: skip
        key = "labels" if job.source.condition.kind == "class" else "texts"
        condition: Any = {key: [item.condition for item in group]}
        writers[grid].write(job.split, codes, ids=[item.index for item in group], previews=previews, **condition)
        advance(len(group))

    with new_directory(job.work / f"{part:06d}", "part") as place:
        for number in job.samples(part).tolist():
            item = next(items)
            assert item.index == number, (item.index, number)
            if item.array is None:
                bad.append(_named(job, item))
                _check_share(job, bad_before + len(bad), bad)
                advance(1)
                continue
            shape = item.array.shape[-2:] + (() if item.preview is None else item.preview.shape[-2:])
            waiting.setdefault(shape, []).append(item)
            if len(waiting[shape]) == job.batch:
                flush(shape, place)
        for shape in sorted(waiting):
            flush(shape, place)
        for writer in writers.values():
            writer.close()
        write_json(place / "part.json", {"samples": len(job.samples(part)), "bad": bad})
    return len(bad)


def _named(job: Job, item: Item) -> dict[str, Any]:
    """What the lists say of a sample that cannot be used."""
    return {"id": item.index, "where": job.source.where(item.index), "reason": item.problem}


def _check_share(job: Job, bad: int, examples: list[dict[str, Any]]) -> None:
    """Raises ValueError if `bad` unusable samples are more than the job allows."""
    stop = job.shards.on_bad_sample == "stop"
    if bad > (0 if stop else job.shards.max_bad_share * len(job.source)):
        allowed = (
            "and --on-bad-sample stop allows none" if stop
            else f"more than the share of {job.shards.max_bad_share} that --max-bad-share allows"
        )  # fmt: skip
        listed = "\n".join(f"  {entry['where']}: {entry['reason']}" for entry in examples[:NAMED])
        raise ValueError(
            f"{bad} of {len(job.source)} samples cannot be read, {allowed}. Repair them or "
            f"{'take skip' if stop else 'raise it'}, and run the same command again: it continues.\n{listed}"
        )


# --- after -----------------------------------------------------------------------------------------------------------


def _merge(job: Job) -> dict[str, Any]:
    """Put the finished parts together; returns the report. Raises ValueError where no sample could be read."""
    bad = [entry for part in range(job.parts) for entry in _bad_samples(job, part)]
    _check_share(job, len(bad), bad)
    pieces: dict[str, list[Manifest]] = {}
    for part in range(job.parts):
        for path in sub_manifests(job.work / f"{part:06d}"):
            pieces.setdefault(path.parent.name, []).append(Manifest.load(path))
    written = sum(manifest.samples(job.split) for group in pieces.values() for manifest in group)
    assert written + len(bad) == len(job.source), (written, len(bad), len(job.source))
    if not written:
        raise ValueError(f"None of the {len(job.source)} samples can be read, so there is nothing to put at {job.out}.")
    assert job.grid is None or len(pieces) == 1, list(pieces)
    account = deepcopy(job.source.account)
    account.used = written
    if bad:
        account.leave_out(UNREADABLE, bad[0]["where"], len(bad))
    grids = {}
    for name, group in sorted(pieces.items()):
        grids[name] = sum(manifest.samples(job.split) for manifest in group)
        _merge_grid(job, job.out / name if job.grid is None else job.out, group, account)
    bad.sort(key=lambda entry: entry["id"])
    if bad:
        lines = "".join(f"{entry['id']}\t{entry['where']}\t{entry['reason']}\n" for entry in bad)
        write_text(job.out / f"bad_images.{job.split}.txt", lines)
    report = {
        "split": job.split,
        "samples": len(job.source),
        "written": written,
        "unreadable": len(bad),
        "found": account.found,
        "left_out": account.left_out,
        "account": str(account),
        "grids": grids,
        "settings": job.identity(),
    }
    write_json(job.report, report)
    shutil.rmtree(job.work, ignore_errors=True)
    return report


def _merge_grid(job: Job, target: Path, group: list[Manifest], account: Account) -> None:
    """Move the tars of one grid to `target` and write its manifest, keeping other splits that are there."""
    target.mkdir(parents=True, exist_ok=True)
    others = [Manifest.load(target)] if (target / FILE_NAME).exists() else []
    if len(found := {each.preview for each in (*group, *others)}) > 1:
        raise ValueError(f"images of one grid at {target} have previews {sorted(map(str, found))}; expected the same.")
    shards = tuple(shard for manifest in group for shard in manifest.shards(job.split))
    for manifest in group:
        for shard in manifest.shards(job.split):
            source, goal = Path(manifest.root) / shard.path, target / shard.path
            if source.exists() or not goal.exists():  # else moved already, by a killed run
                source.replace(goal)
    splits: dict[str, tuple[Shard, ...]] = {job.split: shards}
    accounts: dict[str, Any] = {job.split: account.facts}
    names = job.source.class_names
    for present in others:
        _check_addition(job, present, overwrite=True)
        splits, accounts = present.splits | splits, present.accounts | accounts
        names = present.class_names  # the job's, if it knows any
    splits = {split: splits[split] for split in SPLITS if split in splits}
    own = replace(group[0], tokenizer=job.tokenizer, strange=frozenset())  # typed, so the user's, without a mark too
    replace(own, splits=splits, accounts=accounts, class_names=names).save(target)
