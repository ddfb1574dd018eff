"""Prompts on the command line: generate, score and convert with released Emu3.5 files, and T5 captions for LlamaGen."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("tiktoken")

import emu_files

from flashar_pl import decoding
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.decoding.prompts import ASPECT_RATIOS, read_prompts, scaled_grid
from flashar_pl.models import FlashAR
from flashar_pl.options import DeviceOptions, ModelOptions
from flashar_pl.tokenizers import Emu35Text

PROMPTS = ("a fox", "two red chairs in the snow")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Emu3.5-Image (with the prompt assets), Emu3.5-Image-FlashAR (without) and the image tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    emu_files.write_base(folder / "base")
    emu_files.write_released(folder / "flashar")
    emu_files.write_ibq(folder / "ibq")
    return folder


def drawn(name: str = "out") -> np.ndarray:
    return np.load(Path(name) / "codes.npy")


def expected(files: Path, kind: str, grid: tuple[int, int], null: torch.Tensor, seeds: list[int]) -> np.ndarray:
    """What the library draws for both prompts, two images each, at scale 3."""
    text = Emu35Text.from_directory(files / "base")
    model = load_model(files / kind).model
    prefixes = [ids for ids in text.conditions(PROMPTS, grid) for _ in range(2)]
    nulls = [torch.cat([null, text.image_prefix(*grid)])] * 4
    plan = "raster" if kind == "base" else "diagonal"
    return decoding.generate(model, prefixes, grid, plan, 3.0, seeds=seeds, unconditional=nulls).numpy()


def test_samples_of_prompts_become_captioned_shards(run, work, files) -> None:
    """A caption beside the image of another one would be learnt, silently."""
    words = ["--checkpoint", files / "base", "--tokenizer", files / "ibq"]
    words += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    words += ["--num-images", 2, "--cfg-scale", 3, "--aspect-ratio", "4x6", "--batch-size", 1, "--seed", 7]
    code, _, err = run("tokenize", "samples", *words, "--out", "drawn")
    assert code == 0, err
    code, _, err = run("tokenize", "samples", *words, "--assets", files / "base", "--out", "drawn")
    assert code == 2  # tokens of another place may be other ones; it was called complete
    assert "assets" in err
    read = ShardReader(Manifest.load("drawn"), "train").read(np.arange(4))
    assert sorted(read.texts) == sorted(PROMPTS * 2)
    for text, number, codes in zip(read.texts, read.ids, read.codes, strict=True):
        alone = [*words[:4], "--prompt", text, *words[10:-1], 7 + number, "--num-images", 1, "--codes-only"]
        assert run("generate", *alone, "--out", f"one{number}")[0] == 0
        assert (drawn(f"one{number}")[0] == codes).all()


@pytest.mark.parametrize("kind", ["base", "flashar"])
def test_from_released_directories_to_pictures(run, work, files, kind) -> None:
    """Guidance without an unconditional prompt, or with that of the other checkpoint, draws other codes silently."""
    words = ["--checkpoint", files / kind, "--tokenizer", files / "ibq", "--assets", files / "base", "--batch-size", 4]
    words += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-images", 2, "--seed", 7, "--cfg-scale", 3]
    code, _, err = run("generate", *words, "--aspect-ratio", "16:9", "--image-size", 64, "--out", "out")
    assert code == 0, err
    text = Emu35Text.from_directory(files / "base")
    null = text.unconditional("official" if kind == "base" else "released")
    assert (drawn() == expected(files, kind, (3, 5), null, [7, 8, 9, 10])).all()
    other = text.unconditional("released" if kind == "base" else "official")
    assert (drawn() != expected(files, kind, (3, 5), other, [7, 8, 9, 10])).any()
    record = json.loads(Path("out/settings.json").read_text())
    assert [image["prompt"] for image in record["images"]] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [image["seed"] for image in record["images"]] == [7, 8, 9, 10]
    shown = record["settings"]
    assert (shown["grid"], shown["plan"], shown["dtype"]) == (
        [3, 5],
        "raster" if kind == "base" else "diagonal",
        "fp32",
    )
    assert {Image.open(f"out/{image['file']}").size for image in record["images"]} == {(80, 48)}
    assert Image.open("out/grid.png").size == (2 * 160 + 2, 2 * 96 + 2), "enlarged to at least 64 pixels"


def test_assets_lie_in_the_directory_and_prompts_in_a_file(run, refused, work, files) -> None:
    Path("prompts.txt").write_text("\n".join([*PROMPTS, "", " "]), encoding="utf-8")
    words = ["generate", "--checkpoint", files / "base", "--prompts", "prompts.txt", "--num-images", 1]
    words += ["--codes-only", "--aspect-ratio", "3x2", "--out"]
    code, _, err = run(*words, "out", "--cfg-scale", 1)
    assert code == 0, err
    assert "drawn without guidance" in err
    assert drawn().shape == (2, 3, 2)
    assert json.loads(Path("out/settings.json").read_text())["settings"]["batch_size"] == 2
    assert run(*words, "again", "--prompt", "one more")[0] == 0
    assert len(drawn("again")) == 3
    Path("prompts.txt").write_text("\n")
    assert "has no prompts" in refused(*words, "empty")
    assert not Path("empty").exists()


def test_a_line_is_a_prompt_whatever_the_editor_left_in_it(work) -> None:
    Path("prompts.txt").write_bytes("\ufeffa red\u2028fox\r\n\na blue\x85fox\n".encode())
    assert read_prompts(["first"], "prompts.txt") == ["first", "a red\u2028fox", "a blue\x85fox"]


def test_a_negative_prompt_replaces_the_unconditional_one(run, refused, work, files) -> None:
    base = ["generate", "--checkpoint", files / "flashar", "--assets", files / "base", "--codes-only", "--greedy"]
    base += ["--aspect-ratio", "4x4", "--prompt", "a fox", "--num-images", 1]
    assert run(*base, "--cfg-scale", 4, "--out", "plain")[0] == 0
    assert run(*base, "--cfg-scale", 4, "--negative-prompt", "", "--out", "empty")[0] == 0
    assert run(*base, "--cfg-scale", 4, "--negative-prompt", "a blurred dog", "--out", "dog")[0] == 0
    assert (drawn("plain") == drawn("empty")).all(), "the released template with empty text is the default"
    assert (drawn("plain") != drawn("dog")).any()
    assert "add --cfg-scale" in refused(*base, "--cfg-scale", 1, "--negative-prompt", "dog", "--out", "more")


def test_a_trained_model_uses_the_prompt_it_was_trained_with(run, work, files) -> None:
    """Our own checkpoint, with its grid, tokenizer and unconditional prompt inside; half precision on request."""
    null = [1, 2, 3]
    backbone = load_model(files / "base").model.backbone
    trained = type(backbone)(emu_files.config(heads="visual", unconditional_prompt=tuple(null)))
    trained.load_state_dict(backbone.state_dict())
    model = FlashAR(trained, 1)
    note = Description(model.config(), (3, 4), {"kind": "ibq", "weights": str(files / "ibq")})
    save_model("ours", model, note)
    words = ["generate", "--checkpoint", "ours", "--assets", files / "base", "--prompt", "a fox", "--num-images", 2]
    code, _, err = run(*words, "--cfg-scale", 2, "--out", "out")
    assert code == 0, err
    assert drawn().shape == (2, 3, 4)
    text = Emu35Text.from_directory(files / "base")
    nulls = [torch.cat([torch.tensor(null), text.image_prefix(3, 4)])] * 2
    prefixes = text.conditions(["a fox"] * 2, (3, 4))
    codes = decoding.generate(model, prefixes, (3, 4), "diagonal", 2.0, seeds=0, unconditional=nulls)
    assert (drawn() == codes.numpy()).all()
    assert "without guidance" not in err
    assert run(*words, "--dtype", "bf16", "--codes-only", "--out", "half")[0] == 0
    assert json.loads(Path("half/settings.json").read_text())["settings"]["dtype"] == "bf16"


def test_bad_prompts_are_refused_and_nothing_is_written(refused, work, files, flashar_model) -> None:
    emu = ["generate", "--out", "out", "--checkpoint", files / "flashar"]
    prompt = ["--prompt", "a fox"]
    assert "give one of --prompt or --prompts, --classes" in refused(*emu)
    assert "give --prompt" in refused(*emu, "--classes", "3")
    assert "add --assets DIR" in refused(*emu, *prompt)
    assets = ["--assets", files / "base"]
    assert "--text-encoder is for models of text features" in refused(*emu, *prompt, *assets, "--text-encoder", "t5")
    assert "directory of BAAI/Emu3.5-VisionTokenizer" in refused(*emu, *prompt, *assets)
    assert "expected one of 1:1, 4:3" in refused(*emu, *prompt, "--aspect-ratio", "5:4")
    assert "leave out --image-size" in refused(*emu, *prompt, "--aspect-ratio", "4x4", "--image-size", 64)
    assert "image size is 8 pixels" in refused(*emu, *prompt, "--image-size", 8)
    assert "no prompts at nowhere.txt" in refused(*emu, "--prompts", "nowhere.txt")
    Path("prompts.txt").write_bytes(b"a fox\n\xe4 fox\n")
    assert "prompts.txt, line 2: byte 0xe4 is not UTF-8" in refused(*emu, "--prompts", "prompts.txt")
    assert "prompt 1 is 'a \\udce4'" in refused(*emu, "--prompt", "a \udce4")
    assert "the tokenizer has 17 codes, the model 256" in refused(*emu, *prompt, *assets, "--tokenizer", "pixels:17")
    other = emu_files.write_assets(work / "other")
    with (other / "emu3.tiktoken").open("a") as ranks:
        ranks.write("YWI= 256\n")  # one word more: "ab"
    assert "visual codes from token id 468 on" in refused(*emu, *prompt, "--assets", other)
    classes = ["generate", "--out", "out", "--checkpoint", flashar_model]
    assert "class-conditional; give --classes" in refused(*classes, *prompt)
    assert not Path("out").exists()


def test_aspect_ratios() -> None:
    """Width and height exchanged would draw portraits for landscapes."""
    wanted = {"1:1": (64, 64), "4:3": (55, 73), "16:9": (47, 85), "21:9": (41, 97), "9:16": (85, 47)}
    assert {name: scaled_grid(name, 1024) for name in wanted} == wanted
    assert scaled_grid("9:16", 512) == (42, 24)


def test_pictures_have_the_grids_that_training_images_are_sorted_into() -> None:
    from flashar_pl.data.images import default_grids

    assert {scaled_grid(name, 512) for name in ASPECT_RATIOS if name != "21:9"} == set(default_grids(512, 16))


# --- score and convert -----------------------------------------------------------------------------------------------


def test_score_reads_captions(run, refused, work, files) -> None:
    from flashar_pl.data.shards import ConditionSpec, ShardWriter

    codes = np.random.default_rng(0).integers(0, emu_files.CODES, (5, 2, 3))
    spec = ConditionSpec("text")
    with ShardWriter("shards", name="t", tokenizer={}, grid=(2, 3), vocabulary=emu_files.CODES, condition=spec) as out:
        out.write("test", codes, ids=range(5), texts=[f"caption {'x' * i}" for i in range(5)])
    code, out, err = run("score", "--checkpoint", files / "flashar", "--data", "shards", "--assets", files / "base")
    assert code == 0, err
    model = load_model(files / "flashar").model.eval()
    prefixes = Emu35Text.from_directory(files / "base").conditions([f"caption {'x' * i}" for i in range(5)], (2, 3))
    with torch.no_grad():
        nll = model.loss(torch.tensor(codes), prefixes)["nll"]
    assert json.loads(out)["nll_nats_per_image"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert run("score", "--checkpoint", files / "base", "--data", "shards")[0] == 0, "assets lie in the directory"
    assert "add --assets" in refused("score", "--checkpoint", files / "flashar", "--data", "shards")


@pytest.mark.parametrize("kind", ["base", "flashar"])
def test_convert_to_our_format_and_back_is_bit_exact(run, refused, work, files, kind) -> None:
    """Only visual rows are loaded: the text rows of the heads come from the original directory."""
    code, out, err = run("convert", files / kind, "--out", "ours", "--tokenizer", files / "ibq", "--grid", "32x32")
    assert code == 0, err
    assert "condition token ids" in out
    assert "add --original DIR" in refused("convert", "ours", "--to", "official", "--out", "back")
    code, _, err = run("convert", "ours", "--to", "official", "--original", files / kind, "--out", "back")
    assert code == 0, err
    first, second = (load_file(folder / "model.safetensors") for folder in (files / kind, Path("back")))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads(Path("back/config.json").read_text()) == json.loads((files / kind / "config.json").read_text())
    assert load_model("back").model.config() == load_model(files / kind).model.config()
    assert run("convert", files / kind, "--to", "official", "--out", "direct")[0] == 0
    assert "are a directory" in refused("convert", files / kind, "--to", "official", "--out", "x.safetensors")
    other = files / ("flashar" if kind == "base" else "base")
    assert "layout of the" in refused("convert", "ours", "--to", "official", "--original", other, "--out", "x")


def test_official_directories_are_cut_into_files(work, files) -> None:
    from flashar_pl.checkpoints.safetensors_files import write_shards

    tensors = load_file(files / "base" / "model.safetensors")
    shutil.copytree(files / "base", "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    write_shards(Path("cut"), tensors, shard_bytes=100_000)
    names = sorted(path.name for path in Path("cut").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    again = load_model("cut").model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in load_model(files / "base").model.state_dict().items())


@pytest.mark.parametrize(("given", "stored"), [(None, "bf16"), ("fp32", "fp32")])
def test_emu_directories_are_opened_in_their_own_precision(tmp_path, files, given, stored) -> None:
    """A 34-billion model in bfloat16 would need 136 GB if it were opened in float32."""
    from safetensors.torch import save_file

    tensors = load_file(files / "flashar" / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((files / "flashar" / "config.json").read_text())
    source = open_checkpoint(ModelOptions(str(tmp_path)), DeviceOptions(dtype=given))
    assert source.dtype == stored
    assert {str(p.dtype) for p in source.model.parameters()} == {
        "torch.float32" if given == "fp32" else "torch.bfloat16"
    }


def test_a_trained_emu_flashar_has_no_official_format(refused, work, files) -> None:
    model = FlashAR(load_model(files / "base").model.backbone, 2, 1, "average", "fused")
    with pytest.raises(ValueError, match="emu35 backbone has no official format"):
        model.to_nar()
    save_model("ours", model, Description(model.config()))
    words = ["--to", "official", "--original", files / "base", "--out", "back"]
    assert "has no official format" in refused("convert", "ours", *words)


# --- T5 --------------------------------------------------------------------------------------------------------------


def test_llamagen_prompts_without_transformers(refused, work, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    torch.save({"model": tiny.backbone(condition="text", caption_dim=16).to_official()}, "t2i.pt")
    words = ["generate", "--checkpoint", "t2i.pt", "--n-head", 2, "--grid", 4, "--plan", "raster", "--codes-only"]
    words += ["--prompt", "a fox", "--out", "out"]
    assert "--text-encoder DIR" in refused(*words)
    Path("t5").mkdir()
    Path("t5/config.json").write_text("{}")
    assert "pip install 'flashar-pl[emu]'" in refused(*words, "--text-encoder", "t5")


def test_llamagen_prompts_through_a_t5(run, refused, work) -> None:
    """Against transformers' own encoder: padding on the wrong side would shift every caption."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "fox", "dog", "in", "snow"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    encoder.save_pretrained("t5")
    from flashar_pl.tokenizers.t5 import encode_captions

    features, mask = encode_captions("t5", ["A fox ", "a dog in snow"])
    assert features.shape == (2, 120, 16)
    assert mask.sum(1).tolist() == [3, 5]
    with torch.no_grad():
        alone = encoder(input_ids=torch.tensor([[3, 5, 6, 7, 1]])).last_hidden_state[0]
    torch.testing.assert_close(features[1, -5:], alone, atol=1e-5, rtol=1e-4)
    torch.save({"model": tiny.backbone(condition="text", caption_dim=16).to_official()}, "t2i.pt")
    base = ["generate", "--checkpoint", "t2i.pt", "--n-head", 2, "--grid", 4, "--plan", "raster", "--codes-only"]
    base += ["--text-encoder", "t5", "--prompt", "a fox", "--num-images", 2, "--cfg-scale", 3]
    code, _, err = run(*base, "--out", "plain")
    assert code == 0, err
    assert run(*base, "--negative-prompt", "a dog", "--out", "dog")[0] == 0
    assert (drawn("plain") != drawn("dog")).any()
    Path("empty").mkdir()
    base[base.index("t5")] = "empty"
    assert "empty holds no T5 encoder of captions: config.json is missing" in refused(*base, "--out", "more")


def test_half_precision_survives_conversion(run, work) -> None:
    """Read in float32, a bfloat16 file would double in size and no longer be the same bit for bit."""
    torch.save({"model": {k: v.bfloat16() for k, v in tiny.backbone().to_official().items()}}, "half.pt")
    assert run("convert", "half.pt", "--n-head", 2, "--out", "ours")[0] == 0
    assert {value.dtype for value in load_file("ours/model.safetensors").values()} == {torch.bfloat16}
