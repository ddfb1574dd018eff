"""Emu3.5 checkpoints in and out: names, shapes, config.json, and files read row by row."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashar_pl.backbones import Emu35
from flashar_pl.checkpoints.safetensors_files import SafetensorsDirectory

GOLDEN = Path(__file__).parents[1] / "golden" / "emu35"
CONFIG = {**json.loads((GOLDEN / "emu_tiny.json").read_text())["config"], "eoi_token_id": 127, "eol_token_id": 120}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return load_file(GOLDEN / "emu_tiny_state.safetensors")


def write_directory(path: Path, tensors: dict[str, Tensor], sharded: bool) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "Emu3", **CONFIG}))
    if not sharded:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {key: SHARDS[i % 2] for i, key in enumerate(tensors)}
    for shard in SHARDS:
        save_file({key: value for key, value in tensors.items() if weight_map[key] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_directory_round_trip_is_bit_exact(state, tmp_path, sharded, dtype):
    """Fused projections come apart into unequal pieces (4 query heads, 2 key heads); the dtype stays."""
    state = {key: value.to(dtype) for key, value in state.items()}
    directory = write_directory(tmp_path / "emu", state, sharded)
    for heads in ("full", "visual"):
        model = Emu35.from_directory(directory, heads=heads)  # type: ignore[arg-type]
        assert same(model.to_official(source=directory), state)
    assert same(Emu35.from_official(state, CONFIG).to_official(), state)
    mixed = {key: value.double() if "norm" in key else value for key, value in state.items()}
    assert {p.dtype for p in Emu35.from_official(mixed, CONFIG).parameters()} == {dtype}  # or its products would fail


def test_trained_visual_rows_join_the_text_rows_of_the_source(state, tmp_path):
    """Export of visual heads keeps our visual rows and the checkpoint's text rows, and needs the checkpoint."""
    directory = write_directory(tmp_path / "emu", state, sharded=False)
    model = Emu35.from_official(state, CONFIG, heads="visual")
    assert model.head.weight.shape == (384, 64)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(ValueError, match="source=DIR"):
        model.to_official()
    head = model.to_official(source=directory)["lm_head.weight"]
    assert torch.equal(head[:128], state["lm_head.weight"][:128])
    assert torch.equal(head[128:], state["lm_head.weight"][128:] + 1.0)


def test_names_and_shapes_are_strict(state):
    extra = {**state, "model.layers.4.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unknown keys \(model.layers.4.mlp.up_proj.weight\)"):
        Emu35.from_official(extra, CONFIG)
    missing = {key: value for key, value in state.items() if key != "model.layers.1.self_attn.k_norm.weight"}
    with pytest.raises(ValueError, match=r"1 missing keys \(model.layers.1.self_attn.k_norm.weight\)"):
        Emu35.from_official(missing, CONFIG)
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(32, 64\); this model expects \(64, 64\)"):
        Emu35.from_official(state, {**CONFIG, "num_key_value_heads": 4})
    with pytest.raises(ValueError, match="this model expects"):
        Emu35.from_official(state, {**CONFIG, "vocab_size": 511})
    quantised = {**state, "model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(128, 64\) of integers"):
        Emu35.from_official(quantised, CONFIG)
    table = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    Emu35.from_official({f"module.{key}": value for key, value in table.items()}, CONFIG)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "num_key_value_heads"])
def test_nothing_in_the_config_is_assumed(state, name):
    with pytest.raises(ValueError, match=f"lacks {name}"):
        Emu35.from_official(state, {key: value for key, value in CONFIG.items() if key != name})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_features_that_emu_lacks_are_refused(state, change):
    """Loading such a model would give wrong logits without an error."""
    with pytest.raises(ValueError, match=next(iter(change))):
        Emu35.from_official(state, {**CONFIG, **change})


def test_config_variants(state):
    """Nested, with newer RoPE fields, without head_dim (then read from the weights), with an explicit offset."""
    plain = Emu35.from_official(state, CONFIG)
    assert plain.config.visual_token_offset == 128
    nested = {"backbone_config": {k: v for k, v in CONFIG.items() if k != "eoi_token_id"}, "visual_token_offset": 128}
    assert Emu35.from_official(state, nested).config == plain.config
    newer = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "head_dim")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert Emu35.from_official(state, newer).config == plain.config
    for harmless in (
        None,
        {"rope_type": "default"},
        {"type": "default", "factor": 4.0},
        {"type": "linear", "factor": 1.0},
    ):
        assert Emu35.from_official(state, {**CONFIG, "rope_scaling": harmless}).config == plain.config
    same = {"hidden_act": "swish", "layer_types": ["full_attention"] * CONFIG["num_hidden_layers"]}
    assert Emu35.from_official(state, {**CONFIG, **same}).config == plain.config
    assert Emu35.from_official(state, {**CONFIG, "visual_token_offset": 130}).vocabulary == 382
    assert Emu35.from_official(state, {**CONFIG, "rms_norm_eps": 1e-5}).norm.eps == 1e-5  # type: ignore[union-attr]


def test_more_layers_than_tensors_are_refused_before_anything_is_built(state):
    with pytest.raises(ValueError, match=r"num_hidden_layers is 1,000,000, more than the \d+ tensors"):
        Emu35.from_official(state, {**CONFIG, "num_hidden_layers": 10**6})


def test_broken_directories_are_named(state, tmp_path):
    directory = write_directory(tmp_path / "emu", state, sharded=True)
    assert (
        SafetensorsDirectory(directory).rows("model.norm.weight", 3, 5).tolist()
        == state["model.norm.weight"][3:5].tolist()
    )
    index, shard = directory / "model.safetensors.index.json", directory / SHARDS[1]
    names = index.read_text()
    index.write_text(names.replace(SHARDS[0], f"../{SHARDS[0]}"))
    with pytest.raises(ValueError, match="expected files of this directory"):
        Emu35.from_directory(directory)
    index.write_text(names)
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="incomplete"):
        Emu35.from_directory(directory)
    shard.unlink()
    with pytest.raises(ValueError, match=r"no file .*00002-of-00002"):
        Emu35.from_directory(directory)
    with pytest.raises(ValueError, match="holds neither"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        SafetensorsDirectory(tmp_path)
