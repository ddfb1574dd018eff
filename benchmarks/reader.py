"""Speed of the shard reader on one core: samples per CPU-second from shards to ready `Batch`.

    OMP_NUM_THREADS=1 python benchmarks/reader.py [--out benchmarks/results/reader.json]

Writes shards like those of ImageNet at 256 px (16 x 16 codes of 2 bytes, ten crops, blocks of 100) to a temporary
directory and reads one shuffled epoch of global batches in this process. For comparison it reads the same tars through
webdataset's own pipeline, block by block and unshuffled; that reads all ten crops and keeps one. The files are in the
page cache: the disk is not measured. CPU time, so that other programs on the machine do not count. The last line is
JSON; the value is the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import webdataset

from flashar_pl.data.batches import training_batches
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter

SIDE, VOCABULARY, CROPS, BLOCK, WINDOW = 16, 16384, 10, 100, 256


def write(directory: str, samples: int) -> Manifest:
    """Shards of random codes."""
    rng = np.random.default_rng(0)
    with ShardWriter(
        f"{directory}/codes",
        name="random",
        tokenizer={},
        grid=(SIDE, SIDE),
        vocabulary=VOCABULARY,
        condition=ConditionSpec("class", num_classes=1000),
        crops=CROPS,
        block=BLOCK,
    ) as writer:
        for start in range(0, samples, 1000):
            ids = np.arange(start, min(start + 1000, samples))
            codes = rng.integers(0, VOCABULARY, (len(ids), CROPS, SIDE, SIDE))
            writer.write("train", codes, ids=ids, labels=ids % 1000)
    return writer.manifest


def read_shuffled(manifest: Manifest, batch_size: int) -> int:
    """One epoch through the order and the reader. Returns the samples read."""
    batches = training_batches([manifest], batch_size, 0, WINDOW)
    return sum(len(batches[0, g]) for g in range(len(batches)))


def read_webdataset(manifest: Manifest, batch_size: int) -> int:
    """One pass of webdataset over the same tars, unshuffled; blocks are cut into samples, then batched."""
    urls = [str(Path(manifest.root) / shard.path) for shard in manifest.shards("train")]
    rows = (
        (codes, label)
        for record in webdataset.WebDataset(urls, shardshuffle=False).decode()
        for codes, label in zip(record["codes.npy"][:, 0], record["labels.npy"], strict=True)
    )
    count, pending = 0, []
    for row in rows:
        pending.append(row)
        if len(pending) == batch_size:
            torch.from_numpy(np.stack([codes for codes, _ in pending]).astype(np.int64))
            torch.tensor([label for _, label in pending])
            count, pending = count + batch_size, []
    return count


def rate(read: Callable[[], int], repeats: int) -> float:
    """Median samples per CPU-second."""
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        samples = read()
        rates.append(samples / (time.process_time() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="also write the JSON to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        start = time.process_time()
        manifest = write(directory, args.samples)
        written = args.samples / (time.process_time() - start)
        shuffled = rate(lambda: read_shuffled(manifest, args.batch_size), args.repeats)
        plain = rate(lambda: read_webdataset(manifest, args.batch_size), args.repeats)
    result = {
        "name": "reader",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"OMP_NUM_THREADS=1 python benchmarks/reader.py --samples {args.samples} "
        f"--batch-size {args.batch_size} --repeats {args.repeats}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "codes_per_sample": SIDE * SIDE,
        "samples_per_cpu_second": round(shuffled),
        "webdataset_unshuffled_samples_per_cpu_second": round(plain),
        "written_samples_per_cpu_second": round(written),
    }
    print(f"shuffled, ready batches: {shuffled:,.0f} samples per CPU-second; webdataset, unshuffled: {plain:,.0f}")
    line = json.dumps(result, allow_nan=False)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
