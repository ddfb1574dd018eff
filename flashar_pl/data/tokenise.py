"""A restartable job that turns the samples of a source into code shards, in any number of processes.

The samples are shuffled once by a fixed permutation and cut into *parts*; a part becomes one tar (one for each grid).
Part u belongs to process u mod R, and which samples meet in a pass of the tokenizer depends on the part alone, so
the result does not depend on R. A part is written under a temporary name and renamed when it is finished: a killed
job loses the part it was at, and the next start does that one again. While it runs, the output directory holds

    .SPLIT/job.json                       settings; a restart with others is refused
    .SPLIT/000017/16x16/manifest.json     a finished part (its tar beside it), for each grid
    .SPLIT/000017/part.json               number of samples, and the unreadable ones

The process that finds every part finished moves the tars out and writes manifest.json, then
tokenize-SPLIT.json (the report) and bad_images.SPLIT.txt, then removes .SPLIT.

Shapes: n samples of one pass, K crops of an image, H x W grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flashar_pl.data.images import Unreadable
from flashar_pl.data.manifest import SPLITS
from flashar_pl.data.order import permutation, stream
from flashar_pl.data.parts import (
    check_share,
    commit_part,
    finish,
    finished_parts,
    new_part,
    read_part,
    report_path,
    retry_bad,
    start,
    without_path,
)
from flashar_pl.data.sources import Source
from flashar_pl.data.writer import ShardWriter

READ = 8
"""Samples a worker process sends at once."""


@dataclass
class Item:
    """One sample as a worker sends it."""

    index: int
    array: np.ndarray | None
    """What `Job.prepare` made of it; None if it is unreadable."""
    condition: int | str
    problem: str = ""


@dataclass
class Job:
    """What to tokenise, how, and where to."""

    source: Source
    prepare: Callable[[bytes], np.ndarray]
    """Bytes of a sample -> array whose last two axes tell its grid; runs in worker processes."""
    encode: Callable[[np.ndarray], np.ndarray]
    """Equal-sized arrays (n, ...) -> codes (n, K, H, W)."""
    out: Path
    name: str
    """Of the data set."""
    split: str
    tokenizer: dict[str, Any]
    vocabulary: int
    crops: int
    """K."""
    batch: int
    """n, at most."""
    settings: dict[str, Any]
    """What else decides the result; a restart must have the same."""
    grid: tuple[int, int] | None = None
    """(H, W) of every sample; None = grids differ, and each gets a data set of its own in OUT/HxW."""
    evaluation_crop: int = 0
    """Which crop evaluation takes."""
    block: int = 100
    part: int = 2000
    """Samples of a part."""
    shuffle: bool = True
    workers: int = 4
    max_bad_share: float = 0.01
    rank: int = 0
    ranks: int = 1
    progress: Callable[[int, int], Callable[[int], Any]] = lambda total, done: lambda n: None
    """Called once with this process's number of samples and how many of them are done; what it returns is called
    with the number of samples of every pass."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}.")
        for name in ("batch", "block", "part"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; expected 0 or more.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; expected a share from 0 to 1.")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"RANK={self.rank}, WORLD_SIZE={self.ranks}; expected 0 <= RANK < WORLD_SIZE.")
        self.order = np.arange(len(self.source))
        if self.shuffle:
            self.order = permutation(stream(0, 4), len(self.source))

    @property
    def work(self) -> Path:
        """The directory of finished parts."""
        return self.out / f".{self.split}"

    @property
    def parts(self) -> int:
        """Number of parts of all processes."""
        return -(-len(self.source) // self.part)

    def samples(self, part: int) -> np.ndarray:
        """Numbers of the samples of a part."""
        return self.order[part * self.part : (part + 1) * self.part]

    def identity(self) -> dict[str, Any]:
        """What a restart must agree on."""
        return {
            "name": self.name,
            "source": self.source.fingerprint(),
            "samples": len(self.source),
            "tokenizer": without_path(self.tokenizer),
            "crops": self.crops,
            "block": self.block,
            "part": self.part,
            "shuffle": self.shuffle,
            **self.settings,
        }


def run(job: Job) -> dict[str, Any] | None:
    """Tokenise this process's parts, starting where an earlier run stopped.

    Returns:
        The report once all parts of all processes are finished; None while other processes are still at work.

    Raises:
        ValueError: an earlier run had other settings; the shards at `out` do not go with these; more unreadable
            samples than allowed; a label or code out of range.
    """
    try:
        report = start(job)
        if report is not None:
            return report
        _run_parts(job)
    except FileNotFoundError:
        if not report_path(job).exists():  # else another process found nothing left to do, merged and cleaned up
            raise
    return finish(job)


def _run_parts(job: Job) -> None:
    """Tokenise what is left of this process's parts."""
    mine = range(job.rank, job.parts, job.ranks)
    retry_bad(job, mine)
    finished = finished_parts(job)
    left = [part for part in mine if part not in finished]
    bad = sum(len(read_part(job, part)["bad"]) for part in finished.intersection(mine))
    total, open_samples = (sum(len(job.samples(part)) for part in parts) for parts in (mine, left))
    advance = job.progress(total, total - open_samples)
    items = _items(job, left)
    for part in left:
        if report_path(job).exists():
            return
        bad += _write_part(job, part, items, advance, bad)


def _write_part(job: Job, part: int, items: Iterator[Item], advance: Callable[[int], Any], bad_before: int) -> int:
    """Tokenise one part. Returns the number of unreadable samples in it."""
    place = new_part(job, part)
    writers: dict[tuple[int, int], ShardWriter] = {}
    waiting: dict[tuple[int, ...], list[Item]] = {}
    bad: list[dict[str, Any]] = []

    def flush(shape: tuple[int, ...]) -> None:
        group = waiting.pop(shape)
        codes = job.encode(np.stack([item.array for item in group if item.array is not None]))  # (n, K, H, W)
        grid = (int(codes.shape[-2]), int(codes.shape[-1]))
        if grid not in writers:
            writers[grid] = _writer(job, place, grid, part)
        key = "labels" if job.source.condition.kind == "class" else "texts"
        condition: Any = {key: [item.condition for item in group]}
        writers[grid].write(job.split, codes, ids=[item.index for item in group], **condition)
        advance(len(group))

    for number in job.samples(part).tolist():
        item = next(items)
        assert item.index == number, (item.index, number)
        if item.array is None:
            bad.append({"id": number, "where": job.source.where(number), "reason": item.problem})
            check_share(job, bad_before + len(bad), bad)
            advance(1)
            continue
        _check_label(job, item)
        shape = item.array.shape[-2:]
        waiting.setdefault(shape, []).append(item)
        if len(waiting[shape]) == job.batch:
            flush(shape)
    for shape in sorted(waiting):
        flush(shape)
    for writer in writers.values():
        writer.close()
    commit_part(job, part, place, bad)
    return len(bad)


def _writer(job: Job, place: Path, grid: tuple[int, int], part: int) -> ShardWriter:
    return ShardWriter(
        place / f"{grid[0]}x{grid[1]}",
        name=job.name,
        tokenizer=job.tokenizer,
        grid=grid,
        vocabulary=job.vocabulary,
        condition=job.source.condition,
        crops=job.crops,
        block=job.block,
        shard_blocks=-(-job.part // job.block),
        first_shard=part,
        evaluation_crop=job.evaluation_crop,
    )


def _check_label(job: Job, item: Item) -> None:
    classes = job.source.condition.num_classes
    if classes is not None and not 0 <= int(item.condition) < classes:
        raise ValueError(
            f"{job.source.where(item.index)} has the label {item.condition}; expected 0 .. {classes - 1}. "
            "Set the number of classes."
        )


def _items(job: Job, parts: list[int]) -> Iterator[Item]:
    """The samples of some parts, in order, read by worker processes."""
    groups = [group.tolist() for part in parts for group in _cut(job.samples(part))]
    if not groups:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total")  # as --workers says
        loader = DataLoader(
            _Reading(job.source, job.prepare),
            sampler=groups,
            batch_size=None,
            num_workers=job.workers,
            collate_fn=_as_is,
            generator=torch.Generator(),
        )
        read = iter(loader)
    for group in read:
        yield from group


def _cut(numbers: np.ndarray) -> list[np.ndarray]:
    return np.split(numbers, range(READ, len(numbers), READ))


@dataclass
class _Reading(Dataset):
    """[numbers of samples] -> [Item], in a worker process."""

    source: Source
    prepare: Callable[[bytes], np.ndarray]

    def __getitem__(self, numbers: list[int]) -> list[Item]:
        return [read_item(self.source, self.prepare, number) for number in numbers]


def read_item(source: Source, prepare: Callable[[bytes], np.ndarray], number: int) -> Item:
    """One sample, or the reason why it cannot be read."""
    try:
        data, condition = source.read(number)
        return Item(number, prepare(data), condition)
    except Unreadable as error:
        return Item(number, None, -1, str(error))


def _as_is(items: list[Item]) -> list[Item]:
    return items
