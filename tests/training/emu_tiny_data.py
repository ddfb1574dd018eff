"""What experiments/emu35_tiny.yaml trains on: python tests/training/emu_tiny_data.py data/emu35_tiny [own]

A tiny base model in the layout of the released one, its prompt assets, a tiny image tokenizer, and shards of captions.
With a second directory, images and lists of captions in it: train.json, held_out.json.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import emu_files

from flashar_pl.data.shards import ConditionSpec, ShardWriter

GRID = (4, 4)
SPLITS = {"train": 48, "validation": 5}
WORDS = ("a red square", "a blue circle seen from far away", "nothing")


def write(root: Path) -> None:
    """root/model, root/tokenizer, root/shards. The codes follow from the caption, so there is something to learn."""
    emu_files.write_base(root / "model")
    emu_files.write_ibq(root / "tokenizer")
    with ShardWriter(
        root / "shards",
        name="emu35-tiny",
        tokenizer={"kind": "ibq", "weights": str(root / "tokenizer")},
        grid=GRID,
        vocabulary=emu_files.CODES,
        condition=ConditionSpec("text"),
        block=4,
    ) as writer:
        random = np.random.default_rng(0)
        for split, n in SPLITS.items():
            kind = np.arange(n) % len(WORDS)
            codes = 16 * kind[:, None, None] + random.integers(0, 4, (n, *GRID))
            writer.write(split, codes, ids=np.arange(n), texts=[WORDS[k] for k in kind])


if __name__ == "__main__":
    images = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if images is not None and images.exists():
        sys.exit(f"{images} exists; choose another directory for the images, or none.")
    write(Path(sys.argv[1]))
    if images is not None:
        emu_files.write_images(images, 56, 0, "train")
        emu_files.write_images(images, 9, 56, "held_out")
