"""From the parts of an evaluation to its results: metrics, codes, samples for other evaluators, a sample grid.

Shapes: n samples, H x W grid, h x w pixels, D pooled features, S spatial features.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from flashar_pl.evaluate.parts import PartFolder

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.evaluate.samples import Bench, Job
    from flashar_pl.metrics.reference import ReferenceStatistics

SHOWN_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)
"""The ImageNet classes that papers of this family show: golden retriever, otter, red panda, geyser, macaw, valley,
balloon, arctic fox."""
ROWS = 4
"""Images of each class in the sample grid."""


def compute_metrics(
    folder: PartFolder, batches: int, names: list[str], bench: Bench, reference: ReferenceStatistics
) -> dict[str, float]:
    """Metrics of all parts, added in the order of batches, so that not even rounding depends on who drew them."""
    from flashar_pl.metrics.collector import DistributionMetrics
    from flashar_pl.metrics.extractor import Features, device_of

    metrics = DistributionMetrics(bench.extractor, names)
    metrics.set_reference(reference)
    metrics.to(device_of(bench.extractor))
    for batch in range(batches):
        part = folder.read(batch)
        metrics.update(Features(part["pool"], part.get("spatial"), part.get("logits")), part["index"])
    return metrics.compute()


def write_codes(folder: PartFolder, batches: int, vocabulary: int) -> str:
    """Write codes.npy (n, H, W) in the smallest unsigned type; returns the sha256 of its values."""
    import numpy as np

    from flashar_pl.data.manifest import code_dtype

    codes = np.concatenate([folder.read(batch)["codes"].numpy() for batch in range(batches)])
    codes = codes.astype(code_dtype(vocabulary))
    target = folder.path / "codes.npy"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, codes)
    temporary.replace(target)
    return hashlib.sha256(codes.tobytes()).hexdigest()


def write_npz(folder: PartFolder, batches: int, n: int, path: Path) -> None:
    """Write the images as `arr_0` (n, h, w, 3) uint8 of an .npz, part by part, for the ADM evaluator."""
    import numpy as np
    from numpy.lib import format as npy

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    height, width = folder.read(0)["images"].shape[2:]
    header = {"descr": np.dtype(np.uint8).str, "fortran_order": False, "shape": (n, height, width, 3)}
    with (
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as stream,
    ):
        npy.write_array_header_1_0(stream, header)
        for batch in range(batches):
            images = folder.read(batch)["images"].permute(0, 2, 3, 1)  # (b, h, w, 3)
            stream.write(np.ascontiguousarray(images.numpy()).tobytes())
    temporary.replace(path)


def shown_classes(num_classes: int) -> list[int]:
    """Classes of the sample grid: the customary eight of ImageNet, else the first eight."""
    return list(SHOWN_CLASSES) if num_classes == 1000 else list(range(min(8, num_classes)))


def draw_grid(bench: Bench, job: Job, num_classes: int, path: Path) -> list[int]:
    """Write the sample grid, one column per class; image k, row by row, uses seed + k. Returns the classes."""
    from dataclasses import replace

    import torch

    from flashar_pl.decoding.samples import draw
    from flashar_pl.pictures import save_png, tile

    classes = shown_classes(num_classes)
    samples = replace(job, labels=classes * ROWS).samples()
    images: Tensor = torch.cat(
        [drawn.images.cpu() for drawn in draw(bench.engine, bench.tokenizer, samples, side=job.side)]
    )
    save_png(tile(images, len(classes)), path)
    return classes
