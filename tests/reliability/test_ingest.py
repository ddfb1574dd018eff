"""Readers of foreign data answer every damaged file: images, tars, ready codes, lists of captions and of classes."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl.data.captions import CaptionList
from flashar_pl.data.code_files import NpyCodes, PtCodes
from flashar_pl.data.sources import TarSource, class_id, read_classes
from flashar_pl.image_files import FLAT_PIXELS, READABLE, Unreadable, open_rgb
from tests.reliability.containers import inside_zip, summed_png, summed_tar
from tests.reliability.mutate import Target, run, short

CLEAN = (ValueError, Unreadable)
PICTURE = 12 * FLAT_PIXELS
"""Bytes that a picture may take whose file has few: 2 to 4 a pixel as it is stored, and several copies of that."""


def image(kind: str, mode: str) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = (
        Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16)) if mode == "I;16" else pixels.convert(mode)
    )
    pixels.save(buffer, format=kind, exif=exif)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("0.jpg", "0.cls", "._1.jpg", "a/" + "x" * 120 + ".jpg", "a/" + "x" * 120 + ".cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"1"))
    return buffer.getvalue()


def npy_file(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def pt_file(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(values), buffer)
    return buffer.getvalue()


def from_file(name: str, read: Callable[[str], object]) -> Callable[[bytes], object]:
    """A reader of paths as one of bytes."""

    def call(data: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            return read(str(path))

    return call


def read_all(source: TarSource | CaptionList) -> None:
    """Every sample, or why it is none."""
    for i in range(len(source)):
        assert source.where(i)
        try:
            source.read(i)
        except Unreadable as error:
            assert str(error), "no reason"  # noqa: PT017


LINE = b'{"text":"a","image":"b"}'
ITEMS = [{"caption": "a caf\u00e9", "image": "a.png"}, {"caption": "b", "image": ["b/c.png"], "input_image": "d"}]
IMAGES = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "I;16"), ("PNG", "P"), ("WEBP", "RGB")]
IMAGES += [("GIF", "P"), ("TIFF", "RGB"), ("BMP", "RGB"), ("PPM", "L"), ("AVIF", "RGB")]
PNG = [image(*kind) for kind in IMAGES if kind[0] == "PNG"]
READ_TAR = from_file("a.tar", lambda path: read_all(TarSource(path, ("jpg",), "cls", num_classes=2)))
CODES = np.arange(24).reshape(1, 2, 12)
TARGETS = [
    Target("images", open_rgb, [image(*kind) for kind in IMAGES if kind[0] in READABLE], CLEAN, memory=PICTURE),
    Target("tars", READ_TAR, [tar(), tar() + tar()]),
    Target("images, PNG", lambda data: open_rgb(summed_png(data)), PNG, CLEAN, memory=PICTURE),
    Target("tars, headers", lambda data: READ_TAR(summed_tar(data)), [tar()]),
    Target("npy codes", NpyCodes(2, (3, 4), 24), [npy_file(CODES)], CLEAN),
    Target("pt codes", PtCodes(24), [pt_file(CODES[0])], CLEAN),
    Target("pt codes, pickle", *inside_zip(pt_file(CODES[0]), "data.pkl", PtCodes(24)), CLEAN),
    Target(
        "captions",
        from_file("a.json", lambda path: read_all(CaptionList(path))),
        [json.dumps(ITEMS).encode(), json.dumps(ITEMS, ensure_ascii=False, indent=1).encode("utf-8-sig")],
    ),
    Target(
        "caption lines", from_file("a.jsonl", lambda path: read_all(CaptionList(path))), [b'{"text":"a","image":"b"}']
    ),
    Target("classes", from_file("a.txt", read_classes), ["cat\ndog\n\u00e4\n".encode()]),
    Target("class ids", lambda data: class_id(data, None, 100), [b"12\n"], CLEAN),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_end_clean(target: Target) -> None:
    short(target, 80)


def test_an_unpickler_that_ends_within_a_number():
    """struct.error is no ValueError."""
    assert not run(next(target for target in TARGETS if target.name == "pt codes"), 1, first=64081).wrong
