"""Streamed tars give every record they hold: behind an end mark, and under a key that comes again."""

import io
import random
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from webdataset.tariterators import url_opener

from flashar_pl.data.pixels import ImageRows, Prepare
from flashar_pl.data.streaming import Stream, StreamedLoader, _closing
from flashar_pl.data.tally import Tally


def tar(*names: str, **files: bytes) -> bytes:
    """A tar of files that hold their own names, and of others."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in [*((name, name.encode()) for name in names), *files.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
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


def test_hidden_members_do_not_part_a_record(tmp_path: Path) -> None:
    """macOS writes img/._0.jpg between img/0.cls and img/0.jpg: webdataset's grouping makes two halves of them."""
    content = tar("img/0.cls", "img/._0.jpg", "img/0.jpg", "__MACOSX/img/._0.jpg", ".git/1.jpg")
    assert streamed(tmp_path, content + tar("2.cls", "2.jpg"), 2) == [("2", ["cls", "jpg"]), ("img/0", ["cls", "jpg"])]


@pytest.mark.parametrize("url", ["pipe:cat {}", "{}"])
def test_tars_are_closed_as_they_are_left(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar("0.jpg"))
    opened = []

    def noted(tars):
        for each in tars:
            opened.append(each["stream"])
            yield each

    given = iter([{"url": url.format(tmp_path / "a.tar")}] * 2)
    for number, source in enumerate(_closing(noted(url_opener(given)))):
        assert len(source["stream"].read()) > 0
        assert [getattr(each, "stream", each).closed for each in opened] == [True] * number + [False]
    assert [getattr(each, "stream", each).closed for each in opened] == [True, True]


def test_what_was_left_out_is_told_at_the_end_of_a_pass(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "JPEG")
    good = {"2.jpg": picture.getvalue(), "2.cls": b"2"}
    (tmp_path / "a.tar").write_bytes(tar("0.jpg", "0.cls", "._1.jpg", "1.jpg", **good))
    said, tally, prepare = list[str](), Tally(), Prepare(16, 16, 1.0, 3)
    rows = ImageRows(prepare, None, tally)
    stream = Stream([str(tmp_path / "a.tar")], rows, prepare.collate, 1, 0, 1, resampled=False, tally=tally)
    with pytest.warns(UserWarning, match="skipped .*a.tar: [01]: "):
        assert len(list(StreamedLoader(stream, 0, 1, say=said.append))) == 1
    passes = tally.account().used  # the shuffle buffer reads ahead: one or two
    reasons = f"{2 * passes} unreadable, or without an image or a condition, {passes} hidden"
    found = f"found {4 * passes} entries, used {passes}, left out {3 * passes}: {reasons}"
    assert said == [f"Streamed by device 0 so far, what was read ahead included: {found}"]
    quiet = StreamedLoader(replace(stream, rank=1, tally=Tally()), 0, 1, say=said.append)
    quiet.source.tally.count("records")
    quiet._tell()
    assert len(said) == 1, "another device has left nothing out"
    quiet.source.tally.count("hidden")
    quiet._tell()
    assert said[1:] == [said[0].split("found")[0].replace("0", "1") + "found 2 entries, used 1, left out 1: 1 hidden"]
