"""`flashar tokenize`: data sets as shards of codes."""

from __future__ import annotations

from typing import Any


def tokenize_digits(*, out: str = "data/digits", seed: int = 0) -> Any:
    """Write the embedded digits as WebDataset shards of codes, with their manifest.

    scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 17 grey levels used directly as codes, 10 classes: 1,400
    images to train on, 100 to validate, 297 to test. Needs no download.

    Example:
        flashar tokenize digits --out data/digits

    Args:
        out: directory to make; it must not exist.
        seed: of the division into splits.
    """
    from flashar_pl.data import digits

    manifest = digits.tokenize_digits(out, seed)
    counts = ", ".join(f"{manifest.samples(split):,} {split}" for split in manifest.splits)
    print(f"{manifest.name}: {counts} images, {manifest.grid[0]} x {manifest.grid[1]} codes of {manifest.vocabulary}")
    print(f"wrote {out}/manifest.json and its shards")
    return manifest
