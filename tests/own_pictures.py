"""Sixty pictures as people have them: sizes, modes, orientations and formats mixed."""

from pathlib import Path

import numpy as np
from PIL import Image

MODES = ("RGB", "RGBA", "P", "L", "I;16", "CMYK", "LA")


def make_pictures(root: Path, classes: tuple[str, ...] = ("bee", "cup", "owl"), each: int = 20) -> Path:
    """Smooth random pictures in one sub-folder a class, "" = none, with a hidden file and a note among them."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            mode, turn = MODES[i % len(MODES)], 1 + i % 8
            size = [int(side) for side in rng.integers(20, 90, 2)]
            levels = (rng.integers(0, 256, (4, 4, 3)) // 2 + 40 * label % 128).astype(np.uint8)
            image = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
            if mode == "I;16":
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / f"{i}.png")
                continue
            image = image.convert(mode)
            if mode in ("RGBA", "LA"):
                alpha = Image.fromarray(rng.integers(0, 256, (3, 3), dtype=np.uint8))
                image.putalpha(alpha.resize(size, Image.Resampling.BICUBIC))
            exif = Image.Exif()
            exif[0x0112] = turn
            suffix = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
            image.save(folder / f"{i}.{suffix}", exif=exif)
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "notes.txt").write_text("mine")
    return root
