"""Our own files, Lightning checkpoints, official containers, and what a run starts from."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import llamagen_golden

from flashar_pl.checkpoints import safetensors_files
from flashar_pl.checkpoints import weights as own_format
from flashar_pl.checkpoints.description import Description, build_model, build_on_meta
from flashar_pl.checkpoints.initialise import initialise
from flashar_pl.checkpoints.official import official_weights
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY, EMA_PREFIX, NET_PREFIX
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.models.base import GridModel
from flashar_pl.tensor_files import drop_pages, read_torch

MODELS = {
    "raster": lambda: RasterAR(tiny.backbone(condition_dropout=0.2)),
    "text": lambda: RasterAR(tiny.backbone(condition="text")),
    "grouped": lambda: RasterAR(tiny.backbone(n_kv_head=1)),
    "flashar": lambda: tiny.flashar(m=1, k=2, corner="fused"),
    "average": lambda: tiny.flashar(m=2, fusion="average"),
    "intra": lambda: tiny.flashar(m=1, intra={"groups": 4}),
}


def assert_same_model(found: GridModel, expected: GridModel) -> None:
    assert found.config() == expected.config()
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key


def saved(path: Path, model: GridModel) -> Path:
    save_model(path, model, Description(model.config(), grid=(3, 4)))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    description = Description(model.config(), (3, 4), {"kind": "pixels", "levels": 17}, {"step": 7})
    save_model(tmp_path / "model", model, description)
    loaded = load_model(tmp_path / "model")
    assert loaded.description == description
    assert_same_model(loaded.model, model)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    condition = tiny.captions([1, 2]) if name == "text" else tiny.classes(2)
    codes = tiny.codes(2, 3, 4)
    torch.testing.assert_close(loaded.model.eval()(codes, condition).fused, model(codes, condition).fused, **tiny.CLOSE)


def test_above_the_limit_there_are_shards_with_an_index(tmp_path: Path, monkeypatch) -> None:
    """Guards a model of 34 B in one file that a Hub refuses, and shards that nothing reads or compares."""
    model, shards = tiny.flashar(m=1), safetensors_files.write_shards
    monkeypatch.setattr(own_format, "write_shards", partial(shards, shard_bytes=20_000))
    place = saved(tmp_path / "model", model)
    names = sorted(path.name for path in place.iterdir())
    assert names[0] == "README.md"
    assert sum(name.startswith("model-0") for name in names) > 1
    assert "model.safetensors.index.json" in names
    assert_same_model(load_model(place).model, model)
    shard = next(place.glob("model-00001*"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        load_model(place)


@pytest.mark.parametrize("name", MODELS)
def test_config_is_plain_and_complete(name: str) -> None:
    config = MODELS[name]().config()
    assert json.loads(json.dumps(config)) == config
    assert build_on_meta(config).config() == config
    assert all(p.device.type == "meta" for p in build_on_meta(config).parameters())
    assert build_model(config).config() == config


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = MODELS["raster"]()
    saved(tmp_path / "model", model)
    with pytest.raises(ValueError, match="exists; the model would overwrite it"):
        saved(tmp_path / "model", model)
    with pytest.raises(TypeError):
        save_model(tmp_path / "other", model, Description(model.config(), training={"bad": object()}))
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no half-written directory"


def test_lightning_checkpoints_choose_their_weights(tmp_path: Path) -> None:
    raw, averaged = tiny.flashar(seed=0), tiny.flashar(seed=3)
    state = {NET_PREFIX + key: value for key, value in raw.state_dict().items()}
    content = {CHECKPOINT_KEY: Description(raw.config(), (3, 4)).to_dict(), "state_dict": state}
    torch.save(content, tmp_path / "raw.ckpt")
    content["state_dict"] = {**state, **{EMA_PREFIX + key: value for key, value in averaged.state_dict().items()}}
    torch.save(content, tmp_path / "both.ckpt")
    assert_same_model(load_model(tmp_path / "raw.ckpt").model, raw)
    assert_same_model(load_model(tmp_path / "both.ckpt").model, averaged)
    assert_same_model(load_model(tmp_path / "both.ckpt", weights="ema").model, averaged)
    assert_same_model(load_model(tmp_path / "both.ckpt", weights="raw").model, raw)
    assert load_model(tmp_path / "both.ckpt").description.grid == (3, 4)
    with pytest.raises(ValueError, match="holds no averaged weights; use --weights raw"):
        load_model(tmp_path / "raw.ckpt", weights="ema")
    with pytest.raises(ValueError, match="expected auto, raw or ema"):
        load_model(tmp_path / "raw.ckpt", weights="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_official_containers(container: str | None, tmp_path: Path) -> None:
    """The published samplers accept these; training saves add argparse arguments."""
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    content = state if container is None else {container: state, "args": argparse.Namespace(dim=64), "steps": 3}
    torch.save(content, tmp_path / "official.pt")
    loaded = load_model(tmp_path / "official.pt", n_head=4)
    assert isinstance(loaded.model, RasterAR)
    assert all(torch.equal(value, state[key]) for key, value in official_weights(loaded.model).items())


def test_files_are_read_in_the_wanted_dtype(tmp_path: Path) -> None:
    """Guards the one tensor at a time: a model in the file's dtype stood beside the one in the wanted dtype."""
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    torch.save(state, tmp_path / "official.pt")
    loaded = load_model(tmp_path / "official.pt", n_head=4)
    save_model(tmp_path / "ours", loaded.model, loaded.description)
    for path in (tmp_path / "official.pt", tmp_path / "ours"):
        half = load_model(path, n_head=4, dtype=torch.bfloat16).model.state_dict()
        assert all(torch.equal(half[name], value.bfloat16()) for name, value in loaded.model.state_dict().items())


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_what_was_copied_from_a_file_takes_no_memory(tmp_path: Path) -> None:
    """Guards against a second model in memory: the pages of the file that the first was copied from."""

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text().split("big.pt\n")
        return sum(int(each.split("Rss:")[1].split()[0]) for each in maps[1:])

    torch.save({"a": torch.arange(500_000), "b": torch.ones(3)}, tmp_path / "big.pt")
    found = read_torch(tmp_path / "big.pt", mmap=True)
    expected = found["a"].clone()
    assert resident() > 3000  # KiB
    drop_pages(found["a"])
    assert resident() < 300
    assert torch.equal(found["a"], expected)
    own = torch.arange(500_000)
    drop_pages(own)  # no file to read them from
    assert torch.equal(own, expected)


@pytest.mark.parametrize("word", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_leave_names_behind_anywhere(word: str, tmp_path: Path) -> None:
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    wrapped = {f"{word}.{key.replace('layers.0.', f'layers.0.{word}.')}": value for key, value in state.items()}
    torch.save({"model": wrapped}, tmp_path / "wrapped.pt")
    found = official_weights(load_model(tmp_path / "wrapped.pt", n_head=4).model)
    assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_averaged_weights_of_official_files(tmp_path: Path) -> None:
    """Beside the raw ones or instead of them; which ones were read is said."""
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    raw = {key: value + 1 for key, value in state.items()}
    torch.save({"model": raw, "ema": state}, tmp_path / "both.pt")
    torch.save({"ema": state}, tmp_path / "ema.pt")
    torch.save({"model": raw}, tmp_path / "raw.pt")
    for name, weights, expected in (
        *(("both", "auto", "ema"), ("both", "raw", "raw"), ("both", "ema", "ema")),
        *(("ema", "auto", "ema"), ("raw", "auto", "")),
    ):
        loaded = load_model(tmp_path / f"{name}.pt", weights, n_head=4)  # type: ignore[arg-type]
        assert loaded.source == f"official file ({expected} weights)" if expected else "official file"
        key = "norm.weight"
        assert torch.equal(official_weights(loaded.model)[key], (state if expected == "ema" else raw)[key])
    with pytest.raises(ValueError, match="no averaged weights"):
        load_model(tmp_path / "raw.pt", "ema", n_head=4)
    with pytest.raises(ValueError, match="averaged weights only"):
        load_model(tmp_path / "ema.pt", "raw", n_head=4)


def test_official_nar_file_and_safetensors(tmp_path: Path) -> None:
    state, _ = llamagen_golden("nar_tiny")
    save_file(state, tmp_path / "nar.safetensors")
    loaded = load_model(tmp_path / "nar.safetensors", n_head=4)
    assert isinstance(loaded.model, FlashAR)
    assert loaded.model.dual_head.corner == "fused"
    written = official_weights(loaded.model)
    assert written.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in written.items())
    with pytest.raises(ValueError, match=r"width 64 is no published size.*--n-head"):
        load_model(tmp_path / "nar.safetensors")


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*absent"):
        load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no config.json and model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    with pytest.raises(ValueError, match=r"Did you mean .*run/checkpoints/last\.ckpt"):
        load_model(tmp_path / "run")
    for name in ("text.pt", "text.safetensors", "text.ckpt"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor\.pt"):
        load_model(tmp_path / "tensor.pt")


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"not a torch file that can be read safely: .*Unsupported global") as caught:
        load_model("evil.pt")
    assert "weights_only" not in str(caught.value)  # torch's advice is to read it unsafely
    assert not Path("evil-was-here").exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", MODELS["raster"]())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"kind": "os.system"}}, "backbone kind is 'os.system'"),
        ({"kind": "flashar"}, "expected .* with branch_layer"),
        ({"run": "os.system"}, "'raster' with run"),
    ],
)
def test_a_description_says_what_to_build_and_nothing_else(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_model({**MODELS["raster"]().config(), **change})


def test_more_layers_than_tensors_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    config = saved(tmp_path / "m", MODELS["raster"]()) / "config.json"
    values = json.loads(config.read_text())
    values["model"]["backbone"]["n_layer"] = 10**6
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"n_layer is 1,000,000, more than the \d+ tensors"):
        load_model(tmp_path / "m")


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", MODELS["raster"]())
    config = json.loads((path / "config.json").read_text())
    config["model"]["backbone"]["vocab_size"] = 20
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has shape \(19, 16\).*expects \(20, 16\)"):
        load_model(path)
    config["model"]["backbone"].update(vocab_size=19, n_layer=3)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"blocks\.2"):
        load_model(path)


# --- starting a run --------------------------------------------------------------------------------------------------


def test_flashar_run_from_raster_file(tmp_path: Path) -> None:
    """The vertical branch is cloned after the backbone's weights are in, not from its random start."""
    source = MODELS["raster"]()
    model = FlashAR(tiny.backbone(seed=9), 1)
    report = initialise(model, saved(tmp_path / "m", source))
    codes, ids = tiny.codes(2, 3, 4), tiny.classes(2)
    ours, theirs = (each.eval().backbone.raster_logits(codes, ids) for each in (model, source))
    torch.testing.assert_close(ours, theirs, **tiny.CLOSE)
    out = model(codes, ids)
    torch.testing.assert_close(out.vertical, out.horizontal, atol=1e-6, rtol=1e-6)
    gate = sum(parameter.numel() for name, parameter in model.named_parameters() if model.roles()[name] == "gate")
    assert report.new == gate
    assert report.loaded == sum(parameter.numel() for parameter in source.parameters())
    assert report.loaded + report.cloned + report.new == sum(parameter.numel() for parameter in model.parameters())
    assert f"{report.loaded:,} parameters loaded" in str(report)


def test_flashar_run_from_flashar_file(tmp_path: Path) -> None:
    """A trained vertical branch is kept, never cloned again."""
    source, model = tiny.flashar(seed=1), FlashAR(tiny.backbone(seed=9), 1)
    report = initialise(model, saved(tmp_path / "m", source))
    assert_same_model(model, source)
    assert (report.cloned, report.new) == (0, 0)


def test_intra_run_from_flashar_file(tmp_path: Path) -> None:
    """Everything but the new head is taken over; where the file has one it is, and is not dropped without a word."""
    source, model = tiny.flashar(seed=1), FlashAR(tiny.backbone(seed=9), 1, intra={"alone": True})
    head = {name: value.clone() for name, value in model.state_dict().items() if ".intra." in name}
    report = initialise(model, saved(tmp_path / "plain", source))
    for name, value in model.state_dict().items():
        assert torch.equal(value, (source.state_dict() | head)[name]), name
    assert (report.cloned, report.new) == (0, sum(value.numel() for value in head.values()))
    again = FlashAR(tiny.backbone(seed=8), 1, intra={"groups": 4})
    initialise(again, saved(tmp_path / "intra", model))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"holds another model: --model.flashar.intra \{"):
        initialise(FlashAR(tiny.backbone(), 1), tmp_path / "intra")


def test_a_file_with_another_gate_names_the_option(tmp_path: Path) -> None:
    saved(tmp_path / "m", tiny.flashar(fusion="logit_gate"))
    with pytest.raises(ValueError, match=r"--model.flashar.fusion 'logit_gate' \(this run: 'gate'\)"):
        initialise(FlashAR(tiny.backbone(), 1), tmp_path / "m")


@pytest.mark.parametrize("kind", ["raster", "flashar"])
def test_weights_of_other_classes_start_a_run(kind: str, tmp_path: Path) -> None:
    """Everything but the table of classes is taken over, which the report says."""
    source, backbone = MODELS[kind](), tiny.backbone(seed=9, num_classes=3)
    model = FlashAR(backbone, 1, 2, corner="fused") if kind == "flashar" else RasterAR(backbone)
    table = model.backbone.condition_embedding.table.weight.clone()  # type: ignore[union-attr]
    report = initialise(model, saved(tmp_path / "m", source))
    key = "backbone.condition_embedding.table.weight"
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], table if name == key else value), name
    assert report.new == table.numel()
    assert report.loaded == sum(p.numel() for p in model.parameters()) - table.numel()
    assert "its 5 classes are other ones: the table of 3 classes is new" in str(report)


def test_run_from_official_file(tmp_path: Path) -> None:
    """Heads come from the run's config, since official weights do not tell them."""
    state, arrays = llamagen_golden("gpt_c2i_tiny")
    torch.save({"model": state}, tmp_path / "c2i.pt")
    sizes = {"dim": 64, "n_layer": 4, "n_head": 4, "vocab_size": 128, "num_classes": 10, "multiple_of": 32}
    model = FlashAR(tiny.backbone(**sizes), 3).eval()
    initialise(model, tmp_path / "c2i.pt")
    logits = model.backbone.raster_logits(arrays["in/token_ids"].view(-1, 8, 8), arrays["in/class_ids"])
    torch.testing.assert_close(logits.flatten(1, 2), arrays["out/logits"], **tiny.CLOSE)


def test_text_run_takes_the_null_caption(tmp_path: Path) -> None:
    source, model = MODELS["text"](), FlashAR(tiny.backbone(seed=9, condition="text"), 1)
    initialise(model, saved(tmp_path / "m", source))
    null = "condition_embedding.null"
    assert torch.equal(model.backbone.state_dict()[null], source.backbone.state_dict()[null])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RasterAR(tiny.backbone(dim=24)), r"another backbone: dim 16 \(this run: 24\)"),
        (lambda: RasterAR(tiny.backbone(condition="text")), r"condition 'class' \(this run: 'text'\)"),
        (lambda: RasterAR(tiny.backbone(rope_base=5.0)), r"rope_base 10000.0 \(this run: 5.0\)"),
    ],
)
def test_another_size_or_kind_is_named(make: object, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", MODELS["raster"]())
    model = make()  # type: ignore[operator]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["raster", "flashar"])
def test_files_from_before_a_field_had_a_name(kind: str, tmp_path: Path) -> None:
    """Guards older checkpoints: a field that their config lacks has its default, and is no other size."""
    source = RasterAR(tiny.backbone(condition="text")) if kind == "raster" else tiny.flashar(m=1, condition="text")
    path = saved(tmp_path / "m", source)
    values = json.loads((path / "config.json").read_text())
    del values["model"]["backbone"]["caption_positions"]
    (path / "config.json").write_text(json.dumps(values))
    initialise(FlashAR(tiny.backbone(seed=9, condition="text"), 1), path)
    assert load_model(path).model.backbone.config.caption_positions == 120


def test_flashar_files_start_flashar_runs_of_the_same_shape_only(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", tiny.flashar(m=1))
    with pytest.raises(ValueError, match="is a FlashAR model and this run trains a raster model"):
        initialise(RasterAR(tiny.backbone()), path)
    with pytest.raises(ValueError, match=r"another model: --model.flashar.branch_layer 1 \(this run: 2\)"):
        initialise(FlashAR(tiny.backbone(), 2), path)
    with pytest.raises(ValueError, match=r"fusion 'gate' \(this run: 'average'\)"):
        initialise(FlashAR(tiny.backbone(), 1, fusion="average"), path)
