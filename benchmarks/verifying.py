"""What comparing a run's checkpoint with its digests costs, as a share of the time to load it.

    python benchmarks/verifying.py [--out benchmarks/results/verifying.json]

Writes a checkpoint as a fit with averaged weights leaves one (weights, averages, two moments; about 300 MB) to a
temporary directory and loads its model, by turns with the comparison and without: wall time and, since other programs
disturb it less, CPU time. The file is in the page cache: a disk makes the shares smaller. Values are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from flashar_pl import integrity
from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY, EMA_PREFIX, NET_PREFIX
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models.raster import RasterAR
from flashar_pl.tensor_files import SUMS, page_sums


def write(path: Path, width: int) -> None:
    """A checkpoint of a raster model of four layers, with averages and moments."""
    model = RasterAR(LlamaGen(LlamaGenConfig(width, n_layer=4, n_head=8, vocab_size=1024, num_classes=10)))
    state = {prefix + name: value for prefix in (NET_PREFIX, EMA_PREFIX) for name, value in model.state_dict().items()}
    copies = {name: value.clone() for name, value in state.items()}
    moments = {
        i: {key: torch.rand_like(value) for key in ("exp_avg", "exp_avg_sq")}
        for i, value in enumerate(model.state_dict().values())
    }
    about = Description(model.config()).to_dict()
    content = {"state_dict": copies, "optimizer_states": [{"state": moments}], CHECKPOINT_KEY: about}
    torch.save({**content, SUMS: page_sums(copies.values())}, path)


def load(path: Path, verify: bool) -> tuple[float, float]:
    """Seconds and CPU-seconds that a load takes in a process that has not seen the file."""
    integrity._whole.clear()
    os.environ.pop(integrity.SWITCH, None)
    if not verify:
        os.environ[integrity.SWITCH] = "1"
    start, cpu = time.perf_counter(), time.process_time()
    load_model(path)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576, help="Of the model; the file grows with its square.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="JSON file for the result.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "last.ckpt"
        write(path, options.width)
        size = path.stat().st_size
        load(path, True)
        pairs = [(load(path, True), load(path, False)) for _ in range(options.repeats)]
    (verified, verified_cpu), (plain, plain_cpu) = (
        (statistics.median(each[0] for each in column), statistics.median(each[1] for each in column))
        for column in zip(*pairs, strict=True)
    )
    shares = [one[1] / other[1] - 1 for one, other in pairs]  # of loads after one another
    result = {
        "name": "verifying",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"python benchmarks/verifying.py --width {options.width} --repeats {options.repeats}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "file_mb": round(size / 1e6),
        "seconds_without": round(plain, 4),
        "seconds_verified": round(verified, 4),
        "share": round(verified / plain - 1, 3),
        "cpu_seconds_without": round(plain_cpu, 4),
        "cpu_seconds_verified": round(verified_cpu, 4),
        "cpu_share": round(verified_cpu / plain_cpu - 1, 3),
        "cpu_share_quartiles": [round(share, 3) for share in statistics.quantiles(shares, n=4)],
    }
    text = json.dumps(result, allow_nan=False)
    if options.out:
        Path(options.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
