"""The drawings of a colour emoji font as a folder of pictures, split and sorted by their Unicode groups.

    python benchmarks/emoji_pictures.py --out data/emoji_png

Draws every emoji of Unicode's list that has no skin tone and that the font knows, at the size of the font's bitmaps,
and writes OUT/{train,val,test}/GROUP/NAME.png, which `flashar tokenize images OUT` reads, and OUT/about.json. Drawings
that differ in their person only ("man judge", "woman judge") are in one split.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from flashar_pl.files import digest, new_directory, require_new, write_json

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
INSTALL = "apt-get install fonts-noto-color-emoji unicode-data (Debian, Ubuntu), or give --font and --names"
BITMAP, SIDE = 109, 136
"""Size that the font's bitmaps answer to, and the side of the square they are drawn on, in pixels."""
PERSONS = {"man", "woman", "person", "men", "women", "people"}
HELD_OUT = {"val": 5, "test": 10}
"""Splits beside train, and the percentage of each."""


class Emoji(NamedTuple):
    """One line of Unicode's list."""

    text: str
    name: str
    group: str


def read_names(text: str) -> Iterator[Emoji]:
    """The fully qualified emoji without a skin tone of emoji-test.txt (UTS #51); groups by their first word."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].split()[0].lower()
        codes, _, rest = line.partition(";")
        status, _, comment = rest.partition("#")
        if status.strip() == "fully-qualified" and "skin tone" not in line:
            name = comment.split(maxsplit=2)[2]  # "😀 E1.0 grinning face"
            yield Emoji("".join(chr(int(code, 16)) for code in codes.split()), name, group)


def split_of(name: str) -> str:
    """The split of a drawing, by the SHA-256 of its name without the words for a person."""
    words = [word for word in name.replace(":", " ").replace(",", " ").split() if word not in PERSONS]
    place = int(hashlib.sha256(" ".join(words).encode()).hexdigest(), 16) % 100
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """An emoji in the middle of a white square; None where the font has no single drawing of it."""
    left, top, right, bottom = font.getbbox(text)
    if right - left > SIDE:  # the font knows the parts of a sequence only
        return None
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    place = (SIDE - right + left) / 2 - left, (SIDE - bottom + top) / 2 - top
    ImageDraw.Draw(picture).text(place, text, "black", font, embedded_color=True)
    return picture if picture.getextrema() != ((255, 255),) * 3 else None


def file_name(name: str) -> str:
    """A name as a file name: "flag: Côte d'Ivoire" is "flag Côte d'Ivoire.png"."""
    return "".join(c if c.isalnum() or c in " '-.&!#*()" else " " for c in name).strip().replace("  ", " ") + ".png"


def write_pictures(out: Path, font: Path, names: Path) -> dict[str, object]:
    """Draw all of them into a new directory. Returns, and writes, what was drawn.

    Raises:
        ValueError: no such font or list, Pillow without Raqm, or a directory that exists.
    """
    for path in (font, names):
        if not path.is_file():
            raise ValueError(f"there is no {path}; {INSTALL}.")
    if not features.check("raqm"):
        raise ValueError("this Pillow cannot draw sequences of emoji; pip install --force-reinstall pillow.")
    target, face = require_new(out, "pictures"), ImageFont.truetype(str(font), BITMAP)
    seen: set[bytes] = set()
    counts: dict[str, Counter[str]] = {split: Counter() for split in ("train", *HELD_OUT)}
    left_out = Counter(unknown=0, repeated=0)
    with new_directory(target, "pictures") as folder:
        for emoji in read_names(names.read_text(encoding="utf-8")):
            picture, split = draw(emoji.text, face), split_of(emoji.name)
            if picture is None or picture.tobytes() in seen:
                left_out["unknown" if picture is None else "repeated"] += 1
                continue
            seen.add(picture.tobytes())
            counts[split][emoji.group] += 1
            place = folder / split / emoji.group / file_name(emoji.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
        about = {"font": {"name": " ".join(face.getname()), "digest": digest(font)}, "names": digest(names)}
        found: dict[str, object] = {**about, "pictures": counts, "left_out": left_out}
        write_json(folder / "about.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--font", type=Path, default=FONT, help="a font with colour bitmaps of size 109")
    parser.add_argument("--names", type=Path, default=NAMES, help="Unicode's emoji-test.txt")
    asked = parser.parse_args()
    try:
        found = write_pictures(asked.out, asked.font, asked.names)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for split, groups in found["pictures"].items():
        print(f"{asked.out / split}: {sum(groups.values()):,} pictures of {len(groups)} groups")


if __name__ == "__main__":
    main()
