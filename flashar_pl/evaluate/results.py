"""From the parts of an evaluation to its files: codes, samples for other evaluators, a sample grid.

Shapes: n samples, b of a part, H x W grid, h x w pixels.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from flashar_pl.backbones import ClassIds
from flashar_pl.data.manifest import code_dtype
from flashar_pl.decoding.samples import SampleSet, draw
from flashar_pl.evaluate.parts import PartFolder
from flashar_pl.evaluate.samples import Bench
from flashar_pl.files import replacing
from flashar_pl.pictures import save_png, tile

SHOWN_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)
"""The ImageNet classes that papers of this family show: golden retriever, otter, red panda, geyser, macaw, valley,
balloon, arctic fox. Other data sets: the first eight."""
ROWS = 4
"""Images of each class in the sample grid."""


def write_codes(folder: PartFolder, batches: int, vocabulary: int) -> str:
    """Write codes.npy (n, H, W) in the smallest unsigned type; returns the sha256 of its values."""
    codes = np.concatenate([folder.read(batch)["codes"].numpy() for batch in range(batches)])
    codes = codes.astype(code_dtype(vocabulary))
    with replacing(folder.path / "codes.npy") as part, part.open("wb") as stream:
        np.save(stream, codes)
    return hashlib.sha256(codes.tobytes()).hexdigest()


def write_npz(folder: PartFolder, batches: int, n: int, path: Path) -> None:
    """Write the images as `arr_0` (n, h, w, 3) uint8 of an .npz, part by part, for the ADM evaluator."""
    height, width = folder.read(0)["images"].shape[2:]
    header = {"descr": np.dtype(np.uint8).str, "fortran_order": False, "shape": (n, height, width, 3)}
    with (
        replacing(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as stream,
    ):
        npy.write_array_header_1_0(stream, header)
        for batch in range(batches):
            images = folder.read(batch)["images"].permute(0, 2, 3, 1)  # (b, h, w, 3)
            stream.write(np.ascontiguousarray(images.numpy()).tobytes())


def draw_grid(bench: Bench, path: Path) -> list[int]:
    """Write the sample grid, one column per class; image k, row by row, uses seed + k. Returns the classes."""
    count = bench.source.model.backbone.conditioning.size
    classes = list(SHOWN_CLASSES) if count == 1000 else list(range(min(8, count)))
    own = bench.samples
    labels = torch.tensor(classes * ROWS)
    samples = SampleSet(ClassIds(labels), own.grid, own.plan, own.sampling, own.batch_size, own.seed)
    drawn = [batch.images.cpu() for batch in draw(bench.engine, bench.tokenizer, samples, side=bench.resize)]
    save_png(tile(torch.cat(drawn), len(classes)), path)
    return classes
