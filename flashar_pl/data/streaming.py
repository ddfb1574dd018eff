"""The streamed way of reading: webdataset's own pipeline over any tars that it can open.

    tars -> split by device and worker -> samples -> shuffle buffer -> rows -> batches -> with_epoch on the loader

Every device makes the same number of batches, which distributed training needs. Against the exact way of reading this
gives up: an order that does not depend on the number of devices and workers; resuming at the next sample (a resumed
run continues with a fresh order, so a sample may be seen twice or not at all in a pass); every sample once in an epoch
(which is a number of samples here); and a tar without a manifest that is damaged ends at the damage, with a warning.

Shapes: n samples of a record, b samples of a device's part of a global batch, K crops, H x W grid.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Self

import fsspec
import torch
import webdataset
from braceexpand import braceexpand
from torch.utils.data import get_worker_info
from webdataset.tariterators import url_opener

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.batches import TextEncoder, to_batch
from flashar_pl.data.first_use import FirstUse, wrong_hash
from flashar_pl.data.loader import without_worker
from flashar_pl.data.locations import address, is_remote
from flashar_pl.data.manifest import Manifest
from flashar_pl.data.order import stream
from flashar_pl.data.reader import Row, check_codes, gather, read_record
from flashar_pl.data.tally import Tally
from flashar_pl.data.tars import find_tars, grouped

Rows = Callable[[Iterator[dict[str, Any]], random.Random], Iterator[Any]]
"""webdataset's samples and a reader's random numbers -> rows of a batch."""
META = re.compile(r"__[^/]*__($|/)")
"""Members that are not of a record, by webdataset's rule."""


def _fsspec(url: str, mode: str = "rb", bufsize: int = 0, **options: Any) -> Any:
    return fsspec.open(url, mode, **options).open()


for _scheme in fsspec.available_protocols():  # webdataset's own openers (pipe, http, gs, hf, ...) stay
    webdataset.gopen_schemes.setdefault(_scheme, _fsspec)


def tar_urls(location: str) -> list[str]:
    """Tars as webdataset opens them: URLs and `pipe:` commands with {000..127} written out, or local files.

    Raises ValueError if there are none.
    """
    if is_remote(location):
        return list(braceexpand(location))
    return [str(path) for path in find_tars(location)]


def shard_urls(manifest: Manifest) -> list[str]:
    """The tars of a training split as webdataset opens them."""
    return [address(manifest.root, shard.path) for shard in manifest.shards("train")]


@dataclass(frozen=True)
class Stream:
    """Where streamed batches come from, and how they are mixed."""

    urls: list[str]
    rows: Rows
    collate: Callable[[list[Any]], Any]
    batch_size: int
    """Global."""
    seed: int
    shuffle: int
    """Samples of the buffer from which a reader draws."""
    resampled: bool
    """Each reader draws tars with replacement; False: pass after pass over all tars, dealt out to the readers."""
    arrivals: Arrivals | None = None
    """Verifies the tars, where there is a manifest."""
    shuffle_rows: bool = False
    """Shuffle rows instead of records: where a record holds many samples."""
    rank: int = 0
    ranks: int = 1
    tally: Tally = field(default_factory=Tally)
    """Counts what this device's readers have read, and left out."""

    def check(self, num_workers: int) -> None:
        """Raises ValueError where a reader would have no tar."""
        readers = self.ranks * max(1, num_workers)
        if not self.resampled and readers > len(self.urls):
            raise ValueError(
                f"{self.ranks} devices with {num_workers} workers each are {readers} readers, but there are "
                f"{len(self.urls)} tars. Use fewer workers, write more tars, or set resampled to true."
            )

    def pipeline(self, turn: int) -> webdataset.DataPipeline:
        """Endless batches of this device, another order for every `turn`; run by each worker for itself."""
        key = stream(self.seed, 7, turn)
        reader = partial(_reader, self.rank)
        watch = _Watch(len(self.urls))
        if self.resampled:
            tars: Any = webdataset.ResampledShards(self.urls, seed=key, worker_seed=reader, deterministic=True)
        else:
            tars = webdataset.DataPipeline(
                webdataset.SimpleShardList(self.urls),
                webdataset.detshuffle(len(self.urls), len(self.urls), seed=key),
                _split_by_node(self.rank, self.ranks),
                webdataset.split_by_worker,
            ).repeat()
        mix = webdataset.shuffle(self.shuffle, initial=max(1, self.shuffle // 4), seed=key)
        rows = partial(_run, self.rows, key, reader)
        return webdataset.DataPipeline(
            tars,
            watch.tars,
            partial(_samples, self.arrivals, self.tally),
            watch.samples,
            *((rows, mix) if self.shuffle_rows else (mix, rows)),
            webdataset.batched(self.batch_size // self.ranks, collation_fn=self.collate, partial=False),
        )


def _samples(arrivals: Arrivals | None, tally: Tally, tars: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """webdataset's `tarfile_to_samples`, with a look at each tar before it is opened and after it was read.

    webdataset's own stops at the first end mark, without a word about what `cat a.tar b.tar` has put behind it, leaves
    out a record whose key is that of the one before, and takes hidden members (img/._0.jpg) for the end of a record.
    """

    def unopened(error: Exception) -> bool:
        tally.count("torn")
        return webdataset.warn_and_continue(error)

    opened = _closing(url_opener(tars if arrivals is None else arrivals.files(tars), handler=unopened))
    for source in opened if arrivals is None else arrivals.streams(opened):
        url = source["url"]
        for key, members in grouped(_files(source["stream"], url, tally), lambda name: tally.count("hidden")):
            tally.count("records")
            yield {"__key__": key, "__url__": url, **members}


def _closing(opened: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Opened tars, each closed when the next one is asked for, and at the end."""
    for source in opened:
        stream = source["stream"]  # `Arrivals.streams` puts another one there
        try:
            yield source
        finally:
            with contextlib.suppress(OSError):  # of a command whose output was not read to its end
                stream.close()


def _files(stream: Any, url: str, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of an opened tar. What is damaged ends it, with a warning."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", ignore_zeros=True, tarinfo=_Header) as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it remembers every member
                if info.isreg() and "." in info.name.rpartition("/")[2] and not META.match(info.name):
                    file = tar.extractfile(info)
                    assert file is not None
                    yield info.name, file.read()
    except Exception as error:  # noqa: BLE001 - what reads a URL has errors of its own
        tally.count("torn")
        warnings.warn(f"{url} ends in an error: {error}; the rest is left out.", stacklevel=2)


class _Header(tarfile.TarInfo):
    """A damaged header is an error; tarfile takes it for the end, or looks for the next one."""

    @classmethod
    def fromtarfile(cls, read: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(read)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"no header of a file where one is expected ({error})") from error


class Arrivals:
    """Compares shards with the hashes of their manifest, each once: files before they are opened, streams as they end.

    A stream that breaks off does not end the run, as connections do: it goes on with the next tar, and a warning.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._shards = dict(zip(shard_urls(manifest), manifest.shards("train"), strict=True))
        self._first_use = FirstUse(manifest)
        self._local, self._ahead = not is_remote(manifest.root), False
        self._arrived: set[str] = set()

    def files(self, tars: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Tars on their way to the opener. Raises ValueError for a file that is not as the manifest says."""
        for tar in tars:
            if self._local and not self._ahead:
                self._ahead = True
                self._first_use.check_ahead("train")
            if self._local:
                self._first_use.check([self._shards[tar["url"]]])
            yield tar

    def streams(self, tars: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Opened tars. Raises ValueError after one that did not break off and is not as the manifest says."""
        for tar in tars:
            url = tar["url"]
            if self._local or url in self._arrived:
                yield tar
                continue
            stream = _Hashed(tar["stream"])
            yield tar | {"stream": stream}
            shard = self._shards[url]
            if (length := stream.finish()) < shard.bytes:
                warnings.warn(
                    f"{url} broke off after {length} of {shard.bytes} bytes: the rest is left out.", stacklevel=2
                )
            elif (found := stream.hash.hexdigest()) != shard.sha256:
                raise ValueError(wrong_hash(self.manifest, shard, url, found))
            else:
                self._arrived.add(url)


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.hash, self.bytes = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data

    def finish(self) -> int:
        """Read the rest. Returns the number of bytes of the whole."""
        with contextlib.suppress(OSError):
            while self.read(1 << 20):
                pass
        return self.bytes


def _split_by_node(rank: int, ranks: int) -> Any:
    """webdataset's splitter, unless several devices work on the same samples (tensor parallel)."""
    group = torch.distributed.is_initialized() and torch.distributed.get_world_size() == ranks
    return webdataset.split_by_node if group else partial(_every, rank, ranks)


def _every(rank: int, ranks: int, tars: Iterator[Any]) -> Iterator[Any]:
    return islice(tars, rank, None, ranks)


def _reader(rank: int) -> int:
    """Another number for each worker of each device."""
    info = get_worker_info()
    return rank * 65536 + (0 if info is None else info.id)


def _run(rows: Rows, key: int, reader: Callable[[], int], samples: Iterator[dict[str, Any]]) -> Iterator[Any]:
    return rows(samples, random.Random(stream(key, reader())))


class _Watch:
    """Ends a pipeline none of whose tars gives a sample; it would go on forever."""

    def __init__(self, tars: int) -> None:
        self._most, self._fruitless = 2 * tars, 0

    def tars(self, source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Counts tars on their way to the opener."""
        for tar in source:
            self._fruitless += 1
            if self._fruitless > self._most + 1:
                raise ValueError(f"None of the tars gives a sample, such as {tar['url']}; see the warnings.")
            yield tar

    def samples(self, source: Iterator[Any]) -> Iterator[Any]:
        """Counts nothing once there is a sample."""
        for sample in source:
            self._fruitless = 0
            yield sample


class StreamedLoader:
    """Epochs of a fixed number of streamed batches. Its state is a number of passes: it does not resume exactly.

    It is no torch `DataLoader`, so a Trainer does not replace its sampler: the tars are cut over ranks already.
    """

    def __init__(
        self,
        source: Stream,
        num_workers: int,
        batches: int,
        reshuffle: bool = True,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        """say: is told what this device read, after each pass in which more was left out; by the first one also after
        the first pass."""
        self.source, self.num_workers, self._n, self._reshuffle = source, num_workers, batches, reshuffle
        self.turn, self.position = -1, 0
        self._say, self._said = say, ""

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Any]:
        self.turn, self.position = self.turn + 1, 0
        pipeline = self.source.pipeline(self.turn if self._reshuffle else 0)
        loader = webdataset.WebLoader(
            pipeline, batch_size=None, num_workers=self.num_workers, generator=torch.Generator()
        ).with_epoch(self._n)
        try:
            for batch in without_worker(iter(loader)):
                self.position += 1
                yield batch
        finally:
            self._tell()
        if self.position < self._n:
            raise ValueError(f"The tars gave {self.position} batches, too few for this device; set resampled to true.")

    def _tell(self) -> None:
        account = self.source.tally.account()
        if (left_out := str(account.left_out)) != self._said and (account.left_out or self.source.rank == 0):
            self._say(f"Streamed by device {self.source.rank} so far, what was read ahead included: {account}")
            self._said = left_out

    def state_dict(self) -> dict[str, Any]:
        """The number of the pass, and how far it is; between passes, that of the next one."""
        within = 0 < self.position < self._n
        epoch, position = (self.turn, self.position) if within else (self.turn + 1, 0)
        return {"reading": "streamed", "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin a pass that no earlier part of the run has begun. Warns where it breaks one off."""
        self.turn = state["epoch"] - (state["position"] == 0)
        if state["position"] > 0 and self.source.rank == 0:
            warnings.warn(
                f"Streamed reading does not resume at the sample: pass {state['epoch']} was left at batch "
                f"{state['position']} of {self._n}, and the run goes on with a fresh order. Reading: exact does.",
                stacklevel=2,
            )


def code_rows(manifest: Manifest, samples: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[Row]:
    """Records of code shards -> rows."""
    for sample in samples:
        record = read_record(manifest, sample, f"{sample['__url__']}: {sample['__key__']}")
        check_codes(record["codes.npy"], manifest, sample["__url__"])
        for row in range(len(record["ids.npy"])):
            yield record, row, rng.randrange(manifest.crops)


def collate_codes(manifest: Manifest, text_encoder: TextEncoder | None, rows: list[Row]) -> Batch:
    """Rows of `code_rows` -> a `Batch`."""
    return to_batch(gather(manifest, rows), text_encoder=text_encoder)
