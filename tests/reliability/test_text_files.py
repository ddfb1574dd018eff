"""The readers of text and of arrays answer every damaged file with a value or one line that names it."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch

from flashar_pl.checkpoints.safetensors_files import read_header
from flashar_pl.commands.plot import MEASURED, read_curves
from flashar_pl.data.first_use import check_size
from flashar_pl.data.tars import tar_records
from flashar_pl.files import write_json
from flashar_pl.image_files import Unreadable, open_rgb
from flashar_pl.integrity import check_safetensors
from flashar_pl.pretrained import pretrained
from flashar_pl.tensor_files import read_arrays, read_torch
from flashar_pl.text_files import read_json, read_lines, read_text, read_yaml
from tests.reliability.mutate import Target, short

VALUES = {"name": "ä", "grid": [16, 16], "shards": [{"path": "train/0.tar", "samples": 12, "share": 0.5}], "on": True}


def packed(save=np.savez, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def array(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def torch_file(values) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


TARGETS = [
    Target("json", lambda data: read_json("it.json", data), [json.dumps(VALUES).encode()]),
    Target("yaml", lambda data: read_yaml("it.yaml", data), [b"a: &a {x: 1, y: [2, 3]}\nb: *a\nc: 'd'\nd: 1.5\n"]),
    Target("lines", lambda data: read_lines("it.txt", data), ["one\ntwo ä\n\nthree\n".encode()]),
    Target(
        "arrays",
        lambda data: read_arrays("it.npz", data),
        [packed(mu=np.ones(3), sigma=np.eye(3)), packed(np.savez_compressed, a=np.arange(9)), array(np.arange(6.0))],
    ),
    Target("torch", lambda data: read_torch("it.pt", data), [torch_file({"a": torch.ones(3, 2), "b": [1, "x"]})]),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target):
    short(target, 150)


def test_marks_and_separators_of_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028still one\r\n\ntwo\x85\n".encode())
    assert read_lines(path) == [(1, "one\u2028still one"), (3, "two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":\n "\xff"}', "line 2: byte 0xff is not UTF-8"),
        (b'{"a": 1,\n "b": }', "line 2: not JSON"),
        (b'{"a": NaN}', "line 1: .*NaN is no JSON number"),
        (b'{"a": 1e999}', "1e999 is no JSON number"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 100"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS pointer"),
    ],
)
def test_errors_of_json_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


MAPS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(9))}}}\n"
    for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MAPS, "stands for more than 100,000 values"),
        (MAPS.replace("{k0", "{<<: [*a, *a], k0"), "stands for more than 100,000 values"),
        ("a: &a [1, *a]", "part of"),
        ("a: " + "[" * 200 + "]" * 200, "nested deeper than 100"),
        ("a: 1\nb: [", "line 2|line 3"),
        ("a: !!python/object/apply:os.system [true]", "line 1: not YAML"),
        ("a: 2001-99-99", "month must be"),
    ],
)
def test_errors_of_yaml_are_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_yaml("it.yaml", text.encode())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"checkpoints": None}, {"checkpoints": {"a": 1}}, {"checkpoints": [3]},
                                     {"checkpoints": [{"step": "1", "metrics": {"fid": 2.0}}]}])  # fmt: skip
def test_results_with_other_fields_are_named(tmp_path, content, monkeypatch):
    """Guards `plot`, `sweep`, `compare`, `tokenize` and `evaluate --run`, which ended in a KeyError or TypeError."""
    file = tmp_path / MEASURED
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    monkeypatch.setattr("flashar_pl.commands.plot.read_scalars", lambda run: {})
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_curves(tmp_path)


def test_yaml_may_repeat_itself_a_little():
    assert read_yaml("it.yaml", b"a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


def test_numbers_that_json_has_not_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.fid\.1 is nan"):
        write_json(tmp_path / "it.json", {"metrics": {"fid": [1.0, float("nan")]}})
    assert not list(tmp_path.iterdir())


def test_sizes_of_arrays_are_compared_before_memory_is_asked_for():
    huge = array(np.zeros(4)).replace(b"(4,), }", b"(" + b"9" * 12 + b",), }")
    for data in (huge, _zip_of(huge)):
        with pytest.raises(ValueError, match="announces an array"):
            read_arrays("it.npz", data)
    with pytest.raises(ValueError, match="unpack to 80,000,128"):
        read_arrays("it.npz", packed(np.savez_compressed, a=np.zeros(10**7)))
    with pytest.raises(ValueError, match="Python objects"):
        read_arrays("it.npy", array(np.array([{}], dtype=object)))


def _zip_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", content)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"


def directory_of(path):
    """A directory in transformers' format with such weights."""
    (path.parent / "config.json").write_text('{"model_type": "t5"}')
    return path.parent


@pytest.mark.parametrize(
    ("read", "error"),
    [
        *((read, ValueError) for read in (read_torch, read_arrays, read_text, read_header, check_safetensors)),
        (lambda path: read_torch("it", path.read_bytes()), ValueError),
        (lambda path: read_arrays("it", path.read_bytes()), ValueError),
        (lambda path: list(tar_records(path)), ValueError),
        (lambda path: check_size(str(path), 51200), ValueError),
        (lambda path: pretrained("T5EncoderModel", directory_of(path), "google/flan-t5-xl", "encoder"), ValueError),
        (open_rgb, Unreadable),
    ],
)
def test_pointers_are_no_files(tmp_path, read, error):
    """Some readers called them damaged, and gave the advice to copy them again."""
    path = tmp_path / "weights.pt"
    path.write_bytes(POINTER)
    with pytest.raises(error, match=r"Git LFS pointer.*git lfs pull"):
        read(path)
