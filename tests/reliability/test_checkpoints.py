"""The readers of checkpoints answer every damaged file with a model or one line that names what is wrong."""

import io
import json
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from emu_files import config, hf_config, write_assets, write_ibq
from safetensors.torch import save

from flashar_pl.checkpoints.description import Description, build_on_meta, check_layers
from flashar_pl.checkpoints.emu35 import parse_config
from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.checkpoints.safetensors_files import INDEX as LISTING
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory, read_header
from flashar_pl.checkpoints.sharded import INDEX, SafeReader, write_sharded
from flashar_pl.checkpoints.verify import verify
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.integrity import LIST, listed
from flashar_pl.pretrained import pretrained
from flashar_pl.tensor_files import read_tensors
from flashar_pl.text_files import read_json
from flashar_pl.tokenizers import IBQ
from flashar_pl.tokenizers.hub_vq import PIXELS, HubVQ
from flashar_pl.tokenizers.text import Emu35Text
from tests.reliability.containers import inside_safetensors, inside_zip
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
    write_sharded(PLACE / "s", {"net.a": torch.ones(3, 4), "net.b": torch.ones(2)}, {}, True)
    (PLACE / "s" / LIST).unlink()
    return (PLACE / "s" / INDEX).read_bytes()


def content(values: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


TINY = tiny.flashar(k=1, dim=4, n_layer=1, n_head=1)
CONFIG = Description(TINY.config(), (4, 4), {"kind": "pixels", "levels": 17}).to_dict()
DIGESTS = b'{"format": 1, "piece": 16777216, "files": {"a": {"size": 3, "crc32": ["0123abcd"]}}}'
WEIGHTS = save({"a": torch.ones(3), "b": torch.ones(2, 2)})


def directory(data: bytes) -> None:
    """Every row of the files that an index names."""
    (PLACE / "d" / LISTING).write_bytes(data)
    found = SafetensorsDirectory(PLACE / "d")
    for key in found.stored:
        found.rows(key, 0, found.shape(key)[0] if found.shape(key) else 1)


def listing() -> bytes:
    (PLACE / "d").mkdir()
    (PLACE / "d" / "1.safetensors").write_bytes(WEIGHTS)
    return b'{"metadata": {"total_size": 28}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}'


def converted(data: bytes) -> None:
    """A model of ours with its weights, whatever its description says."""
    (PLACE / "m" / "config.json").write_bytes(data)
    load_model(PLACE / "m")


def description_of_weights() -> bytes:
    save_model(PLACE / "m", TINY, Description.from_dict(CONFIG))
    return (PLACE / "m" / "config.json").read_bytes()


def run_with_weights(path: Path) -> None:
    """As a training is continued, and as a model is loaded."""
    run = RunCheckpoint(path)
    run.tensors({name: name for name in run.names()})
    load_model(path)


def settings() -> bytes:
    return (write_ibq(PLACE / "ibq") / "config.json").read_bytes()


def ranks() -> bytes:
    return (write_assets(PLACE / "assets") / "emu3.tiktoken").read_bytes()


CKPT = {"state_dict": {"net.a": torch.ones(2, 3)}, "global_step": 3, "flashar": CONFIG}
RUN = CKPT | {"state_dict": {f"net.{name}": value for name, value in TINY.state_dict().items()}}
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
        [WEIGHTS],
    ),
    Target(
        "safetensors, header",
        *inside_safetensors(WEIGHTS, placed("b.safetensors", lambda path: (verify(path), read_tensors(path)))),
    ),
    Target("safetensors, index", directory, [listing()]),
    Target("converted model", converted, [description_of_weights()]),
    Target(
        "torch file",
        placed("a.ckpt", read_tensors),
        [content(CKPT), content(CKPT, _use_new_zipfile_serialization=False)],
    ),
    Target("torch file, pickle", *inside_zip(content(RUN), "data.pkl", placed("b.ckpt", run_with_weights))),
    Target("tokenizer's settings", placed("ibq/config.json", lambda path: IBQ.from_files(path.parent)), [settings()]),
    Target("ranks of prompts", placed("emu3.tiktoken", lambda path: Emu35Text(path)), [ranks()]),
    Target("list of digests", placed(LIST, lambda path: listed(path.parent)), [DIGESTS]),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target: Target) -> None:
    short(target, 100)


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="cut off"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("listed", [b"[1]", b'{"a": 1}', b'{"a": "."}', b'{"a": "%s"}' % (b"x" * 300)], ids=repr)
def test_an_index_names_files_of_its_directory(tmp_path: Path, listed: bytes) -> None:
    """Other kinds of values, folders and names that no file system takes ended in tracebacks."""
    (tmp_path / LISTING).write_bytes(b'{"weight_map": %s}' % listed)
    with pytest.raises(ValueError, match="expected"):
        SafetensorsDirectory(tmp_path)


def test_a_header_that_is_nested_too_deep(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="nested too deep"):
        read_header(tmp_path / "a.safetensors")


def test_weights_of_a_run_are_tensors_by_name(tmp_path: Path) -> None:
    for state in ({"net.a": (1, 2)}, {3: torch.ones(2)}, [torch.ones(2)]):
        torch.save(RUN | {"state_dict": state}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match="other things than tensors"):
            load_model(tmp_path / "a.ckpt")
    torch.save({name: value for name, value in RUN.items() if name != "state_dict"}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="more than the 0 tensors"):
        load_model(tmp_path / "b.ckpt")


@pytest.mark.parametrize("wrong", [{"num_res_blocks": 10**9}, {"ch_mult": 3}, {"attn_resolutions": None}], ids=str)
def test_settings_of_a_tokenizer_are_checked_before_it_is_built(wrong) -> None:
    """A billion blocks were built one by one; other kinds of values ended in a TypeError."""
    values = json.loads(settings()) | wrong
    (PLACE / "ibq" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"expected 1 to 16 levels|settings cannot be used"):
        IBQ.from_files(PLACE / "ibq")


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": 10**8}, {"num_layers": "x"}, {"depths": [2, 10**8]}, {"parts": [{"num_blocks": 10**8}]}],
    ids=str,
)
def test_a_network_of_transformers_is_not_built_for_ever(tmp_path: Path, wrong) -> None:
    """Layers were built one by one without end; a word as a number was an error of a kind of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8} | wrong))
    with pytest.raises(ValueError, match=r"expected (at most 1,000 parts|int)"):
        pretrained("T5EncoderModel", tmp_path, "google/flan-t5-xl", "text encoder")


@pytest.mark.parametrize(
    "pixels", [{"rescale_factor": 0}, {"image_std": [1, 0, 1]}, {"image_mean": "x"}, {"image_mean": [1, 2]}], ids=str
)
def test_pixels_of_no_numbers_are_refused(pixels) -> None:
    """They became NaN, and all images black."""
    network = torch.nn.Identity()
    network.quantize, network.config = (
        SimpleNamespace(embedding=torch.nn.Embedding(3, 2)),
        SimpleNamespace(channel_multiplier=[1, 1]),
    )
    with pytest.raises(ValueError, match=r"preprocessor_config\.json has .*; expected finite numbers above 0"):
        HubVQ(network, "it", PIXELS | pixels)
