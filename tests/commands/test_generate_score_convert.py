"""`flashar generate`, `score`, `convert`, `tokenize`: results, files, and bad input."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import tiny_backbone
from PIL import Image
from safetensors.torch import load_file, save_file

from flashar_pl import FlashARPipeline, decoding, devices
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.sharing import card as make_card
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.commands.score import held_out, image_nll
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.options import DeviceOptions, EngineOptions, ModelOptions
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.room import HEADROOM
from flashar_pl.planner.sizes import model_sizes
from flashar_pl.tokenizers import VQ16
from flashar_pl.tokenizers.small_vq import small_spec

# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_writes_pictures_codes_and_settings(run, flashar_model, work):
    code, _, err = run(
        *("generate", "--checkpoint", flashar_model, "--classes", "3,7", "--num-images", 3, "--seed", 5),
        *("--batch-size", 4, "--out", "samples", "--cfg-scale", 1.5),
    )
    assert code == 0, err
    codes = np.load("samples/codes.npy")
    assert codes.shape == (6, 8, 8)
    record = json.loads(Path("samples/settings.json").read_text())
    assert [image["label"] for image in record["images"]] == ["class3"] * 3 + ["class7"] * 3
    assert [image["seed"] for image in record["images"]] == list(range(5, 11))
    assert record["settings"]["cfg_scale"] == 1.5
    assert record["settings"]["plan"] == "diagonal"
    assert record["checkpoint"]["model"]["kind"] == "flashar"
    assert record["versions"]["torch"] == torch.__version__
    for i, image in enumerate(record["images"]):
        pixels = np.asarray(Image.open(f"samples/{image['file']}"))
        assert pixels.shape == (8, 8, 3)
        assert (np.round(pixels[..., 0] / 255 * 16) == codes[i]).all()
    assert Image.open("samples/grid.png").size == (3 * 64 + 4, 2 * 64 + 2)
    assert not list(work.glob(".*part"))


def test_generate_equals_the_library_and_a_partial_batch_is_padded(run, flashar_model, work):
    """Guards the last partial batch: decoded at its own size it would have another batch shape than the others."""
    shapes, engines = [], []
    original = decoding.Engine.generate

    def spy(engine, condition, *args, **kwargs):
        shapes.append(len(condition))
        engines.append(engine)
        return original(engine, condition, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.Engine, "generate", spy)
        for size, name in ((4, "four"), (7, "seven")):
            words = ("--classes", "0-4", "--num-images", 1, "--seed", 9, "--batch-size", size, "--out", name)
            assert run("generate", "--checkpoint", flashar_model, *words)[0] == 0
    assert shapes == [4, 4, 7]
    assert engines[0] is engines[1], "every batch would allocate its buffers anew"
    model = load_model(flashar_model).model
    expected = decoding.generate(model, torch.arange(5), (8, 8), "diagonal", seeds=9).numpy()
    assert (np.load("four/codes.npy") == expected).all()
    assert (np.load("seven/codes.npy") == expected).all()


def test_generate_reports_runner_batch_and_memory(run, flashar_model, work, monkeypatch):
    words = ("--classes", "1", "--num-images", 3, "--codes-only", "--batch-size")
    code, out, err = run("generate", "--checkpoint", flashar_model, *words, "auto", "--out", "auto")
    assert code == 0, err
    record = json.loads(Path("auto/settings.json").read_text())
    assert record["settings"]["batch_size"] == 3, "no larger than there are samples"
    assert record["settings"]["runner"] == "eager"
    assert record["settings"]["weight_format"] == "plain"
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 10**6
    assert "auto: batch 3" in out


def room_for(batch: int, monkeypatch) -> None:
    """Available memory for `batch` samples of the tiny checkpoint and a few bytes more."""
    model = FlashAR(tiny_backbone(), 1)
    memory = DecodeJob(model_sizes(model.config()), "diagonal", (8, 8), batch, False, torch.float32).memory
    need = memory.total - memory.weights  # the model is loaded
    monkeypatch.setattr(devices, "available_memory", lambda device: int(need / HEADROOM) + 1000)


def test_generate_refuses_a_batch_that_cannot_fit(run, refused, flashar_model, work, monkeypatch):
    """Guards against a run that dies of memory after minutes, and against weights that are counted twice."""
    room_for(3, monkeypatch)
    words = ("--checkpoint", flashar_model, "--classes", "0-4", "--num-images", 1, "--codes-only", "--out", "samples")
    error = refused("generate", *words, "--batch-size", 4)
    assert "batch 4 with the diagonal plan needs" in error
    assert "the largest that fits is 3" in error
    assert not list(work.iterdir())
    assert run("generate", *words)[0] == 0
    assert json.loads(Path("samples/settings.json").read_text())["settings"]["batch_size"] == 3
    assert "expected 1 or more" in refused("generate", *words[:-1], "more", "--batch-size", 0)
    monkeypatch.setattr(devices, "available_memory", lambda device: 10)
    assert "not even one image fits" in refused("generate", *words[:-1], "more")


def test_the_null_class_is_no_secret(run, flashar_model, work):
    """Guards against samples without a class where a class was meant: ids of other tools start at 1."""
    words = ("--checkpoint", flashar_model, "--num-images", 1, "--codes-only")
    code, _, err = run("generate", *words, "--classes", "9,10", "--out", "null")
    assert code == 0
    assert "note: class 10 means no class" in err
    assert "note" not in run("generate", *words, "--classes", "9", "--out", "nine")[2]


def test_classes_go_by_the_names_of_the_training_data(run, refused, work):
    """Names with commas too; digits stay ids, as folders that are called 0, 1, 10, 2 stand in another order."""
    model = FlashAR(tiny_backbone(num_classes=4), 1)
    names = ["tench, a fish", "golden retriever", "0", "macaw"]
    note = Description(
        model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17}, training={"class_names": names}
    )
    save_model(work / "named", model, note)
    words = ("generate", "--checkpoint", "named", "--num-images", 1, "--codes-only")
    for given, ids in (("tench, a fish", [0]), ("golden retriever,3, macaw", [1, 3, 3]), ("0-1,macaw", [0, 1, 3])):
        assert run(*words, "--classes", given, "--out", given)[0] == 0
        images = json.loads(Path(given, "settings.json").read_text())["images"]
        assert [image["label"] for image in images] == [f"class{i}" for i in ids]
    assert "did you mean macaw?" in refused(*words, "--classes", "mackaw", "--out", "none")


def test_generate_from_official_weights_needs_grid_and_tokenizer(run, refused, work):
    torch.save({"model": tiny_backbone().to_official()}, "official.pt")
    base = ("generate", "--checkpoint", "official.pt", "--n-head", 2, "--classes", "3", "--out", "samples")
    assert "--grid" in refused(*base)
    assert "--tokenizer" in refused(*base, "--grid", "4x6")
    assert "the tokenizer has 9 codes, the model 17" in refused(*base, "--grid", "4x6", "--tokenizer", "pixels:9")
    assert not Path("samples").exists()
    code, _, err = run(*base, "--grid", "4x6", "--tokenizer", "pixels:17")
    assert code == 0, err
    assert np.load("samples/codes.npy").shape == (4, 4, 6)
    assert "--n-head" in refused("generate", "--checkpoint", "official.pt", "--classes", "3", "--out", "more")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_generate_from_text_features(run, refused, work, suffix):
    backbone = tiny_backbone(condition="text", caption_dim=12)
    torch.save({"model": backbone.to_official()}, "t2i.pt")
    features = torch.randn(2, 5, 12)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    name = f"captions{suffix}"
    if suffix == ".npy":
        np.save(name, features.numpy())
    elif suffix == ".npz":
        np.savez(name, features=features.numpy(), mask=mask.numpy())
    else:
        save_file({"features": features, "mask": mask}, name)
    base = ("generate", "--checkpoint", "t2i.pt", "--n-head", 2, "--grid", 4, "--plan", "raster", "--codes-only")
    words = ("--text-features", name, "--num-images", 2, "--batch-size", 3, "--out", "samples")
    code, _, err = run(*base, *words)
    assert code == 0, err
    assert np.load("samples/codes.npy").shape == (4, 4, 4)
    assert "text-conditional" in refused(*base, "--classes", "3", "--out", "more")


def test_lossless_samples_are_the_raster_plan_s_and_name_their_forwards(run, refused, flashar_model, work):
    """Guards the report of forwards, and the drafter, which must reach the engine and be refused elsewhere."""
    base = ("generate", "--checkpoint", flashar_model, "--classes", "0-2", "--num-images", 1, "--codes-only")
    for plan, more in (("raster", ()), ("lossless", ("--drafter", "vertical", "--window-rows", 1))):
        code, _, err = run(*base, "--plan", plan, *more, "--out", plan)
        assert code == 0, err
    assert np.array_equal(np.load("raster/codes.npy"), np.load("lossless/codes.npy"))
    settings = json.loads((work / "lossless" / "settings.json").read_text())["settings"]
    cells = settings["grid"][0] * settings["grid"][1]
    assert 2 <= settings["forwards"]["mean"] <= settings["forwards"]["most"] <= cells
    assert settings["codes_per_forward"] == cells / settings["forwards"]["mean"]
    assert "for --plan lossless" in refused(*base, "--drafter", "above", "--out", "diagonal")


def test_generate_refuses_bad_input_and_writes_nothing(refused, raster_model, flashar_model, work):
    base = ("generate", "--checkpoint", flashar_model, "--out", "samples")
    assert "class ids range from 11 to 11; expected 0 to 9" in refused(*base, "--classes", "11")
    assert "classes is 'three'; expected numbers such as 3,7" in refused(*base, "--classes", "three")
    assert "--classes" in refused(*base)
    assert "cfg_scale is -0.5; expected 0 or more" in refused(*base, "--classes", "3", "--cfg-scale", -0.5)
    assert "expected one of raster, diagonal" in refused(*base, "--classes", "3", "--plan", "zigzag")
    assert "num_images is 0" in refused(*base, "--classes", "3", "--num-images", 0)
    assert "expected one of" in refused(*base, "--classes", "3", "--runner", "fast")
    graphs = ("--classes", "3", "--device", "cpu", "--runner", "graphs")
    assert "CUDA graphs need a CUDA device" in refused(*base, *graphs)
    raster = ("generate", "--checkpoint", raster_model, "--out", "samples", "--classes", "3")
    assert "--branch-layer" in refused(*raster, "--plan", "diagonal")
    assert "no checkpoint nothing.ckpt" in refused(
        "generate", "--checkpoint", "nothing.ckpt", "--out", "samples", "--classes", "3"
    )
    assert not list(work.iterdir())


def test_generate_never_overwrites(refused, flashar_model, work):
    Path("samples").mkdir()
    Path("samples/mine.txt").write_text("keep")
    message = refused("generate", "--checkpoint", flashar_model, "--classes", "3", "--out", "samples")
    assert "samples exists" in message
    assert [p.name for p in Path("samples").iterdir()] == ["mine.txt"]


# --- score ---------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_image_nll(run, flashar_model, shards, work):
    words = ("--batch-size", 50, "--limit", 120, "--out", "score.json")
    code, out, err = run("score", "--checkpoint", flashar_model, "--data", shards, *words)
    assert code == 0, err
    result = json.loads(out)
    whole = json.loads(Path("score.json").read_text())
    assert result == {name: value for name, value in whole.items() if name not in ("checkpoint", "versions")}
    assert whole["checkpoint"]["model"]["kind"] == "flashar"
    assert (result["images"], result["plan"], result["split"]) == (120, "diagonal", "test")
    manifest = Manifest.load(shards)
    from flashar_pl.data.order import EvaluationOrder

    order = EvaluationOrder(297, 120, 120)
    samples = ShardReader(manifest, "test").read(order.batch(0, 0, 1)[0])
    with torch.no_grad():
        model = load_model(flashar_model).model.eval()
        nll = model.loss(torch.tensor(samples.codes), torch.tensor(samples.labels))["nll"]
    assert result["nll_nats_per_image"] == pytest.approx(float(nll.mean()), abs=1e-3)
    assert result["standard_error"] == pytest.approx(float(nll.std() / 120**0.5), rel=1e-4)
    assert result["bits_per_code"] == pytest.approx(float(nll.mean()) / 64 / np.log(2), rel=1e-4)


def test_score_training_free_equals_the_untrained_flashar(run, raster_model, shards):
    base = ("score", "--checkpoint", raster_model, "--data", shards, "--limit", 20)
    code, out, err = run(*base, "--plan", "diagonal", "--branch-layer", 1)
    assert code == 0, err
    free = json.loads(out)["nll_nats_per_image"]
    own = json.loads(run(*base)[1])
    assert own["plan"] == "raster"
    assert abs(own["nll_nats_per_image"] - free) > 1
    model = FlashAR(load_model(raster_model).model.backbone, 1)

    batches = held_out(Manifest.load(shards), "test", 64, 20, None, "cpu")
    assert float(image_nll(model.eval(), batches, "diagonal").mean()) == pytest.approx(free)


def test_score_bad_input(refused, run, flashar_model, shards, work):
    base = ("score", "--data", shards, "--checkpoint")
    assert "looked for nowhere/manifest.json" in refused("score", "--data", "nowhere", "--checkpoint", flashar_model)
    torch.save({"model": tiny_backbone(vocab_size=9).to_official()}, "nine.pt")
    assert "vocabulary of 17, the model has 9" in refused(*base, "nine.pt", "--n-head", 2)
    torch.save({"model": tiny_backbone().to_official()}, "same.pt")
    run("convert", "same.pt", "--out", "vq", "--n-head", 2, "--grid", "8x8", "--tokenizer", "vq16:weights.pt")
    assert "codes of the tokenizer 'vq16'" in refused(*base, "vq")


# --- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["raster", "nar"])
def test_convert_round_trip_is_bit_exact(run, work, suffix, kind):
    backbone = tiny_backbone()
    if kind == "raster":
        official = backbone.to_official()
    else:
        official = FlashAR(backbone, 2, vertical_layers=1, fusion="average", corner="fused").to_nar()
    if suffix == ".pt":
        torch.save({"model": official}, "in.pt")
    else:
        save_file({k: v.contiguous() for k, v in official.items()}, "in.safetensors")
    code, out, err = run("convert", f"in{suffix}", "--out", "ours", "--n-head", 2, "--grid", "8x8")
    assert code == 0, err
    total = sum(p.numel() for p in load_model("ours").model.parameters())
    assert f"{total:,} parameters" in out
    assert load_model("ours").description.grid == (8, 8)
    assert run("convert", "ours", "--to", "official", "--out", f"back{suffix}")[0] == 0
    back = (
        load_file("back.safetensors") if suffix == ".safetensors" else torch.load("back.pt", weights_only=True)["model"]
    )
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) and back[name].dtype == official[name].dtype for name in back)


def test_a_converted_directory_has_a_card_and_draws_anywhere(run, refused, work, monkeypatch):
    """Guards a repository whose images need a file of its maker's disk, and a card that says other things."""
    backbone = tiny_backbone(vocab_size=16)
    torch.manual_seed(0)
    vq = VQ16(small_spec(4, 16, 32)).eval()
    torch.save({"model": vq.to_official()}, "vq.pt")
    words = ("convert", "raster", "--self-contained", "--grid", "4x4", "--out", "own")
    note = Description({}, training={"step": 7, "total_steps": 9, "class_names": ["a|b", "owl"], "settings": {}})
    model = FlashAR(backbone, 1)
    save_model("raster", model, replace(note, model=model.config()))
    assert "'gone.pt' cannot be copied: nothing is there" in refused(*words, "--tokenizer", "vq16:gone.pt")
    assert not Path("own").exists()
    code, _, err = run(*words, "--tokenizer", "vq16:vq.pt")
    assert code == 0, err
    card = Path("own/README.md").read_text()
    for line in (
        "| FlashAR | branch_layer 1,",
        "| grid | 4 x 4 |",
        "7 steps instead of 16",
        "7 of 9 steps",
        "a\\|b, owl",
    ):
        assert line in card
    text = RasterAR(tiny_backbone(condition="text", caption_dim=12))
    assert "text_encoder=" in make_card("t", text, replace(note, model=text.config()), {})  # draws no prompt without
    Path("vq.pt").unlink()
    Path("far").mkdir()
    Path("own").rename("far/own")
    monkeypatch.chdir("far")
    drawn = FlashARPipeline.from_pretrained("own")(classes="owl", num_images=1, progress=False)
    assert torch.equal(torch.tensor(np.asarray(drawn.images[0])), vq.decode(drawn.codes)[0].permute(1, 2, 0))


def test_convert_bad_input(refused, run, flashar_model, raster_model, work):
    missing = tiny_backbone().to_official()
    del missing["layers.1.attention.wo.weight"]
    torch.save({"model": missing}, "missing.pt")
    message = refused("convert", "missing.pt", "--out", "ours", "--n-head", 2)
    assert "layers.1.attention.wo.weight" in message
    assert "is a directory" in refused("convert", raster_model, "--out", "ours.pt")
    assert "NAR" in refused("convert", flashar_model, "--to", "official", "--out", "flashar.pt")
    assert sorted(p.name for p in work.iterdir()) == ["missing.pt"]
    Path("ours").mkdir()
    assert "ours exists" in refused("convert", raster_model, "--out", "ours")
    assert not list(Path("ours").iterdir())


# --- tokenize ------------------------------------------------------------------------------------------------------


def test_tokenize_digits(run, refused, work):
    code, out, err = run("tokenize", "digits", "--out", "digits")
    assert code == 0, err
    assert "1,400 train" in out
    assert Manifest.load("digits").samples("test") == 297
    assert "digits exists" in refused("tokenize", "digits", "--out", "digits")


def test_the_weights_are_held_in_one_format_only(flashar_model) -> None:
    """int8 is chosen where memory is short: the weights as they were must not stay beside the copy."""
    import gc

    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.decoding.build import build_engine

    source = open_checkpoint(ModelOptions(str(flashar_model)), DeviceOptions("cpu"))
    former, facts = weakref.ref(source.model), source.facts()
    engine = build_engine(source, EngineOptions(runner="eager", weight_format="packed"), "diagonal")
    gc.collect()
    assert former() is None
    assert source.model is engine.model
    assert source.facts() == facts, "what settings.json says of a checkpoint does not depend on the format"
