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
    from flashar_pl.metrics.extractor import FeatureExtractor
    from flashar_pl.metrics.reference import ReferenceStatistics

SHOWN_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)
"""The ImageNet classes that papers of this family show: golden retriever, otter, red panda, geyser, macaw, valley,
balloon, arctic fox."""
ROWS = 4
"""Images of each class in the sample grid."""
KID_SUBSET = 1000


def choose_metrics(
    names: list[str] | None,
    extractor: FeatureExtractor,
    reference: ReferenceStatistics,
    n: int,
    min_samples: int | None,
) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute, and those left out with the reason.

    Args:
        names: metrics asked for, which must all be possible; None = all that are.
        n: samples that will be drawn.
        min_samples: fewest samples, and reference images, for FID and sFID; None = more than they have features.

    Raises:
        ValueError: a metric asked for is not possible, or there are too few samples for FID or sFID.
    """
    from flashar_pl.metrics.collector import NAMES

    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown or (names is not None and not names):
        raise ValueError(f"metrics: unknown {', '.join(unknown) or 'empty list'}; expected of {', '.join(NAMES)}.")
    left_out = {}
    for name in NAMES:
        if names is not None and name not in names:
            continue
        problem = _missing(name, extractor, reference) or _too_few_rows(name, reference, n)
        if problem:
            left_out[name] = problem
            continue
        _check_moments(name, extractor, reference, n, min_samples)
    if names is not None and left_out:
        listed = "; ".join(f"{name}: {problem}" for name, problem in left_out.items())
        raise ValueError(f"not possible: {listed}. Leave out of --metrics what is not possible.")
    return [name for name in NAMES if name not in left_out and (names is None or name in names)], left_out


def _missing(name: str, extractor: FeatureExtractor, reference: ReferenceStatistics) -> str | None:
    if name == "sfid" and not extractor.num_spatial:
        return "the extractor has no spatial features"
    if name == "sfid" and reference.mu_s is None:
        return "the reference has no spatial moments (mu_s, sigma_s)"
    if name == "is" and not extractor.num_classes:
        return "the extractor has no class logits"
    if name in ("precision", "recall", "f1", "kid") and reference.features is None:
        return "the reference has neither images nor feature rows"
    return None


def _too_few_rows(name: str, reference: ReferenceStatistics, n: int) -> str | None:
    needed = KID_SUBSET if name == "kid" else 4 if name in ("precision", "recall", "f1") else 1
    rows = n if reference.features is None or needed == 1 else min(n, len(reference.features))
    return f"{rows} images; it needs {needed:,} on either side" if rows < needed else None


def _check_moments(
    name: str, extractor: FeatureExtractor, reference: ReferenceStatistics, n: int, min_samples: int | None
) -> None:
    """ValueError where FID or sFID would rest on fewer images than asked for."""
    columns = {"fid": extractor.num_features, "sfid": extractor.num_spatial}.get(name)
    if columns is None:
        return
    needed = columns + 1 if min_samples is None else min_samples
    for count, what in ((n, "samples"), (reference.n, "reference images")):
        if count is not None and count < needed:
            raise ValueError(
                f"{count:,} {what} are too few for {name}: its covariance of {columns:,} features needs {needed:,} "
                "(50,000 are usual for ImageNet). Draw more, name other --metrics, or set --min-samples "
                f"{max(2, min(n, reference.n or n))}: such a distance is biased upwards and compares only at equal "
                "numbers."
            )


def compute_metrics(
    folder: PartFolder, batches: int, names: list[str], bench: Bench, reference: ReferenceStatistics
) -> dict[str, float]:
    """Metrics of all parts, added in the order of batches, so that not even rounding depends on who drew them."""
    from flashar_pl.metrics.collector import DistributionMetrics
    from flashar_pl.metrics.extractor import Features, device_of

    metrics = DistributionMetrics(bench.extractor, names=names, kid_subset_size=KID_SUBSET)
    metrics.set_reference(reference)
    metrics.to(device_of(bench.extractor))
    for batch in range(batches):
        part = folder.read(batch)
        metrics.update_features(Features(part["pool"], part.get("spatial"), part.get("logits")), part["index"])
    return {name: value + 0.0 for name, value in metrics.compute().items()}  # -0.0 + 0.0 is 0.0


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
