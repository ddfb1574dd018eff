"""The reader of image files: equal pictures give equal arrays, and no file costs more than it may."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from flashar_pl import image_files
from flashar_pl.image_files import EXTENSIONS, READABLE, Unreadable, open_rgb

GREYS = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_rgb(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_the_picture_in_eight(kind):
    """Pillow clips them: everything above 255 of 65,535 became white."""
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    np.testing.assert_array_equal(pixels(encoded(deep, kind)), pixels(encoded(Image.fromarray(GREYS), kind)))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(kind):
    with pytest.raises(Unreadable, match="black and white are not known"):
        open_rgb(encoded(Image.fromarray(GREYS.astype(kind)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind, orientation):
    corner = np.zeros((8, 16, 3), dtype=np.uint8)
    corner[:4, :4] = 255
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = orientation
    turned = pixels(encoded(Image.fromarray(corner), kind, exif=exif))
    assert turned.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)  # where the white corner belongs
    assert turned[-2 if down else 1, -2 if right else 1].min() > 200
    assert turned[1 if down else -2, 1 if right else -2].max() < 60


def test_damaged_tags_turn_nothing():
    assert open_rgb(encoded(Image.fromarray(GREYS), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (9, 6)


def palette() -> Image.Image:
    image = Image.new("P", (9, 6))
    image.putpalette([10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "transparency"),
    [(Image.new("RGBA", (9, 6), (255, 0, 0, 0)), None), (Image.new("LA", (9, 6), (7, 0)), None),
     (Image.new("RGB", (9, 6), (255, 0, 0)), (255, 0, 0)), (Image.new("L", (9, 6), 3), 3), (palette(), 0),
     (Image.new("I;16", (9, 6), 300), 300)],
)  # fmt: skip
def test_transparency_is_white(image, transparency):
    """Pillow drops it: what nobody sees, often black or red, became the picture."""
    options = {} if transparency is None else {"transparency": transparency}
    assert (pixels(encoded(image, **options)) == 255).all()


def test_half_transparent_red_is_pink():
    assert pixels(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "L", "YCbCr", "HSV"])
def test_every_colour_mode_becomes_rgb(mode):
    picture = Image.fromarray(np.stack([GREYS, GREYS[::-1], 255 - GREYS], -1)).convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "HSV": "TIFF"}.get(mode, "PNG")
    if mode == "HSV":
        picture = picture.convert("RGB")
    assert open_rgb(encoded(picture, kind)).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "AVIF", "JPEG", "PPM"])
def test_formats(kind, tmp_path):
    if kind not in READABLE:
        pytest.skip(f"this Pillow reads no {kind}")
    data = encoded(Image.fromarray(GREYS).convert("RGB"), kind)
    assert open_rgb(data).size == (9, 6)
    (tmp_path / "x").write_bytes(data)
    assert open_rgb(tmp_path / "x").size == (9, 6)
    assert {".jfif", ".gif", ".webp", ".jpg"} <= set(EXTENSIONS)


def test_no_other_program_is_started():
    """An EPS file called x.jpg would run Ghostscript."""
    with pytest.raises(Unreadable, match="no JPEG, PNG"):
        open_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def flat_png(side: int) -> bytes:
    """A PNG that announces side x side pixels of one bit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(side + 7 // 8 + 1)))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [5_000, 13_000, 60_000])
def test_bombs_are_refused_before_they_are_decoded(side, monkeypatch):
    """A PNG of 22 kB cost 1.2 GB."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(Unreadable, match="pixels"):
        open_rgb(flat_png(side))


def test_large_pictures_are_read(monkeypatch):
    """The limit is on what a file cannot hold, not on size alone."""
    monkeypatch.setattr(image_files, "FLAT_PIXELS", 1000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert open_rgb(encoded(noise)).size == (200, 200)
    with pytest.raises(Unreadable, match=r"200 x 200 pixels in .* bytes"):
        open_rgb(encoded(Image.new("1", (200, 200))))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_long_texts_of_a_png_are_no_obstacle(packed, late):
    """Pillow refuses a PNG whose comment unpacks to more than 1 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=packed)
    info.add_itxt("prompt", "y" * 3_000_000, zip=packed)
    data = encoded(Image.fromarray(GREYS), pnginfo=info, icc_profile=bytes(3_000_000))
    if late:  # behind the pixels, where some programs put it
        texts = data.index(b"iCCP") - 4, data.index(b"IDAT") - 4
        end = len(data) - 12
        data = data[: texts[0]] + data[texts[1] : end] + data[texts[0] : texts[1]] + data[end:]
    np.testing.assert_array_equal(pixels(data)[..., 0], GREYS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_damage_is_unreadable_not_a_crash(kind):
    data = encoded(Image.fromarray(GREYS).convert("RGB"), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(len(data) // 2, len(data) + 1)])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        with contextlib.suppress(Unreadable):
            open_rgb(bytes(damaged))


def test_no_image(tmp_path):
    for data in (b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXt"):
        with pytest.raises(Unreadable):
            open_rgb(data)
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        open_rgb(tmp_path / "x.png")
