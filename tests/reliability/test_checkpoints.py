"""The readers of checkpoints answer every damaged file with a model or one line that names what is wrong."""

import io
import json
import struct
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from emu_files import config, hf_config
from safetensors.torch import save

from flashar_pl.checkpoints.description import Description, build_on_meta, check_layers
from flashar_pl.checkpoints.emu35 import parse_config
from flashar_pl.checkpoints.safetensors_files import read_header
from flashar_pl.checkpoints.sharded import INDEX, SafeReader, write_sharded
from flashar_pl.files import read_json, read_tensors
from flashar_pl.integrity import LIST, listed
from tests.reliability.mutate import Target, short

PLACE = Path(tempfile.mkdtemp())


def placed(name: str, read) -> object:
    """A reader of bytes, from one of files."""

    def from_bytes(data: bytes) -> object:
        (PLACE / name).write_bytes(data)
        return read(PLACE / name)

    return from_bytes


def description(data: bytes) -> object:
    model = Description.from_dict(read_json("config.json", data)).model
    check_layers(model.get("backbone"), "n_layer", 30)
    return build_on_meta(model)


def index_and_shards() -> bytes:
    write_sharded(PLACE / "s", {"net.a": torch.ones(3, 4), "net.b": torch.ones(2)}, {}, True, lambda: None)
    (PLACE / "s" / LIST).unlink()
    return (PLACE / "s" / INDEX).read_bytes()


def content(values: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


CONFIG = Description(tiny.flashar().config(), (4, 4), {"kind": "pixels", "levels": 17}).to_dict()
DIGESTS = b'{"format": 1, "piece": 16777216, "files": {"a": {"size": 3, "crc32": ["0123abcd"]}}}'
CKPT = {"state_dict": {"net.a": torch.ones(2, 3)}, "global_step": 3, "flashar": CONFIG}
TARGETS = [
    Target("description", description, [json.dumps(CONFIG).encode()]),
    Target(
        "hub config",
        lambda data: parse_config(read_json("config.json", data), "visual"),
        [json.dumps(hf_config(config())).encode()],
    ),
    Target("sharded index", placed(f"s/{INDEX}", lambda path: SafeReader(path.parent).names()), [index_and_shards()]),
    Target(
        "safetensors",
        placed("a.safetensors", lambda path: (read_header(path), read_tensors(path))),
        [save({"a": torch.ones(3), "b": torch.ones(2, 2)})],
    ),
    Target(
        "torch file",
        placed("a.ckpt", read_tensors),
        [content(CKPT), content(CKPT, _use_new_zipfile_serialization=False)],
    ),
    Target("list of digests", placed(LIST, lambda path: listed(path.parent)), [DIGESTS]),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target: Target) -> None:
    short(target, 100)


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="cut off"):
        read_header(tmp_path / "a.safetensors")
