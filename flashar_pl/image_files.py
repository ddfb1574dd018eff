"""The one reader of image files: data sets, references and scored samples go through `open_rgb`.

Equal pictures give equal arrays, however they are stored: 16 bits a channel become their high bytes, an EXIF tag turns
the picture, transparency is laid on white, CMYK and palettes become RGB. Colour profiles are not applied, of an
animation the first frame is taken. Sizes are compared with limits before anything is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from flashar_pl.text_files import BROKEN, POINTER

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
}
"""Formats that are read, whatever a file is called, and their file names. Pillow knows more; one of them, EPS, starts
another program."""
Image.init()
READABLE = tuple(name for name in FORMATS if name in Image.OPEN)
"""Those of this installation of Pillow."""
EXTENSIONS = tuple(extension for name in READABLE for extension in FORMATS[name])
"""File names that count as images, in lower case; where a record has several, the first one is taken."""

MOST_PIXELS = 2**26
"""Larger images are refused: as RGB they take 4 bytes a pixel, 268 MB."""
FLAT_PIXELS, PIXELS_PER_BYTE = 2**24, 256
"""Images of more than `FLAT_PIXELS` must not have more pixels for a byte of the file: so small a file holds no picture
of that size, but costs the memory of one."""
THINNEST = 8
"""A longer side is cut to this many shorter ones before an image is resized: else a strip of 4,000 x 1 pixels would
become 1,024,000 x 256 on the way to its centre."""
LONG_CHUNK = 1000
"""Bytes of a PNG's text or colour profile from which it may unpack to more than Pillow allows; it is not read then."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the EXIF tag -> what turns the picture upright."""

DAMAGED = (*BROKEN, Image.DecompressionBombError)
"""What Pillow raises."""


class Unreadable(Exception):
    """A sample that cannot be used; its message says why."""


def cut_strip(image: Image.Image, thinnest: int = THINNEST) -> Image.Image:
    """The centre of an image whose longer side has more than `thinnest` shorter ones; others as they are."""
    most = thinnest * min(image.size)
    width, height = (min(side, most) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def open_rgb(source: bytes | str | Path) -> Image.Image:
    """An upright RGB image from the bytes of a file, or from its path.

    Raises `Unreadable`: no image, truncated or damaged, too large, or of pixels without an agreed range.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about sizes and metadata
            image: Image.Image = Image.open(io.BytesIO(_without_long_texts(data)), formats=READABLE)
            _check_size(*image.size, len(data))
            image.load()
            return _upright(_rgb(image), image)
    except UnidentifiedImageError as error:
        if data.startswith(POINTER):
            raise Unreadable("a Git LFS pointer, not the file itself; fetch it with `git lfs pull`") from error
        raise Unreadable(f"its beginning is that of no {', '.join(READABLE)} file") from error
    except DAMAGED as error:
        raise Unreadable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _check_size(width: int, height: int, size: int) -> None:
    pixels = width * height
    if pixels > MOST_PIXELS:
        raise Unreadable(f"{width} x {height} pixels; at most {MOST_PIXELS:,} are read. Make it smaller")
    if pixels > FLAT_PIXELS and pixels > PIXELS_PER_BYTE * size:
        raise Unreadable(f"{width} x {height} pixels in {size:,} bytes; more than such a file can fill is refused")


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, transparency on white."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these hold 16 bits there
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise Unreadable(f"its pixels are {kind}, whose black and white are not known; save 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image)  # (h, w) of 0 .. 65535
        opaque = Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
        clear = image.info.get("transparency")
        if not isinstance(clear, int):
            return opaque
        opaque.paste((255, 255, 255), mask=Image.fromarray(levels == clear))
        return opaque
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """The picture of an image file, turned as its EXIF tag says; damaged tags are left alone, as viewers do."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except DAMAGED:
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _without_long_texts(data: bytes) -> bytes:
    """A PNG without its long texts and colour profiles, for which Pillow refuses it; other files as they are."""
    signature = b"\x89PNG\r\n\x1a\n"
    if not data.startswith(signature):
        return data
    kept, at = [signature], len(signature)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if length <= LONG_CHUNK or kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return data if len(kept) == 1 else b"".join(kept)
