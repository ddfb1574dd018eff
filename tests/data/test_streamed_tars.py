"""Streamed tars give every record they hold: behind an end mark, and under a key that comes again."""

import io
import random
import tarfile
import warnings
from pathlib import Path

import pytest

from flashar_pl.data.streaming import Stream


def tar(*names: str) -> bytes:
    """A tar whose files hold their own names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            file.addfile(info, io.BytesIO(name.encode()))
    return out.getvalue()


def streamed(folder: Path, content: bytes, count: int) -> list[tuple[str, list[str]]]:
    """(key, extensions) of the first records that are streamed from one tar."""
    (folder / "a.tar").write_bytes(content)

    def rows(samples, rng: random.Random):
        return ((each["__key__"], sorted(set(each) - {"__key__", "__url__"})) for each in samples)

    stream = Stream([str(folder / "a.tar")], rows, list, batch_size=count, seed=0, shuffle=1, resampled=False)
    return sorted(next(iter(stream.pipeline(0))))


def test_what_follows_an_end_mark_is_streamed(tmp_path: Path) -> None:
    """`cat a.tar b.tar > both.tar`: webdataset stops at the end of a.tar."""
    both = tar("0.jpg", "0.cls", "1.JPG", "1.cls") + tar("2.jpg", "2.cls", "__meta__/x", "._3.jpg")
    assert streamed(tmp_path, both, 3) == [(str(n), ["cls", "jpg"]) for n in range(3)]


def test_a_key_that_comes_again_begins_a_record(tmp_path: Path) -> None:
    again = tar("0.jpg", "0.cls", "0.jpg", "0.cls", "1.cls") + tar("1.cls")
    assert streamed(tmp_path, again, 4) == [("0", ["cls", "jpg"])] * 2 + [("1", ["cls"])] * 2


def test_a_damaged_header_is_said(tmp_path: Path) -> None:
    """tarfile takes it for the end of the tar."""
    content = bytearray(tar("0.jpg", "1.jpg", "2.jpg"))
    content[1024 + 20] ^= 1
    with pytest.warns(UserWarning, match=r"a\.tar ends in an error: no header of a file"):
        assert streamed(tmp_path, bytes(content), 1) == [("0", ["jpg"])]
    with pytest.warns(UserWarning, match=r"a\.tar ends in an error: no header of a file"):
        assert streamed(tmp_path, tar("0.jpg", "1.jpg")[: 1024 + 100], 1) == [("0", ["jpg"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(streamed(tmp_path, tar("0.jpg", "1.jpg", "2.jpg"), 3)) == 3
