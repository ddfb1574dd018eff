"""`FlashARPipeline`, and the module from Python: what docs/notebook.md shows."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from command_toys import DIGITS, TINY
from pretend_gpu import PretendGPU

from flashar_pl import FlashARPipeline
from flashar_pl.checkpoints.repositories import locate
from flashar_pl.options import SampleOptions
from flashar_pl.training.checks import initial_weights
from flashar_pl.training.lightning_cli import ExperimentCLI
from flashar_pl.training.module import FlashARModule

NOTEBOOK = (Path(__file__).parents[2] / "docs/notebook.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", NOTEBOOK, re.DOTALL)


def test_weights_of_one_byte_do_not_go_to_the_gpu_whole(flashar_model):
    """Guards a model that fits there rounded alone, and a pipeline that says it is on the CPU until it first draws."""
    with PretendGPU(visible=True):
        pipeline = FlashARPipeline.from_pretrained(flashar_model, device="cpu", weight_format="int8").to("cuda")
        assert pipeline.source.model.device.type == "cpu"
        assert pipeline.device == "cuda"


def test_equal_seeds_draw_the_codes_that_generate_writes(run, flashar_model, work):
    """Guards the second way in: another batch shape, grid, tokenizer or seed would draw other images."""
    asked = ("--classes", "3,7", "--num-images", 3, "--seed", 5, "--batch-size", 4, "--cfg-scale", 1.5, "--top-k", 9)
    code, _, err = run("generate", "--checkpoint", flashar_model, *asked, "--out", "samples")
    assert code == 0, err
    pipeline = FlashARPipeline.from_pretrained(flashar_model)
    asked = {"num_images": 3, "seed": 5, "batch_size": 4, "cfg_scale": 1.5, "top_k": 9}
    drawn = pipeline([3, 7], progress=False, **asked)
    assert drawn.codes.tolist() == np.load("samples/codes.npy").tolist()
    first = np.asarray(drawn.images[0])
    assert first.shape == (8, 8, 3)
    assert (np.round(first[..., 0] / 255 * 16) == drawn.codes[0].numpy()).all()
    assert (drawn.labels, drawn.seeds) == (["class3"] * 3 + ["class7"] * 3, list(range(5, 11)))
    assert (drawn.plan, drawn.steps) == ("diagonal", 15)
    assert pipeline.grid == (8, 8)
    assert pipeline(3, num_images=1, plan="raster", codes_only=True, progress=False).steps == 64
    assert drawn.sheet(3).size == (3 * 64 + 4, 2 * 64 + 2)


def test_the_pipeline_has_the_defaults_of_the_command():
    """Guards one option with two defaults."""
    own = inspect.signature(FlashARPipeline.__call__).parameters
    for field in fields(SampleOptions):
        if field.name in own:
            assert own[field.name].default == field.default, field.name


def test_a_pipeline_moves_and_draws_the_same(flashar_model):
    """Guards weights laid out for one device that are carried to another, and a tokenizer that stays behind."""
    pipeline = FlashARPipeline.from_pretrained(flashar_model, weight_format="packed")
    first = pipeline(1, num_images=1, progress=False)
    assert pipeline.to("cpu").device == "cpu"
    assert pipeline(1, num_images=1, progress=False).codes.equal(first.codes)
    with pytest.raises(ValueError, match="device is 'tpu'; expected auto, cpu, cuda"):
        pipeline.to("tpu")


def test_wrong_options_are_refused_with_the_right_ones(flashar_model):
    with pytest.raises(ValueError, match="no option 'tokeniser'; did you mean tokenizer"):
        FlashARPipeline.from_pretrained(flashar_model, tokeniser="pixels:17")
    pipeline = FlashARPipeline.from_pretrained(flashar_model)
    with pytest.raises(ValueError, match="no option 'topk'; did you mean top_k"):
        pipeline(3, topk=5)
    with pytest.raises(ValueError, match="this model is class-conditional"):
        pipeline(prompt="a fox")
    with pytest.raises(ValueError, match="num_images is 0; expected 1 or more"):
        pipeline(3, num_images=0)
    codes = pipeline(3, num_images=1, codes_only=True, progress=False)
    assert codes.images == []
    with pytest.raises(ValueError, match="leave out codes_only"):
        codes.sheet()


@pytest.fixture
def hub_cache(run, flashar_model, monkeypatch, tmp_path):
    """A Hub cache with somebody/a-model, a converted directory, and somebody/half, its configuration alone.

    What is fetched would be fetched by the two recorded functions, with local_files_only=False."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0" * 40
    for name in ("a-model", "half"):
        stored = tmp_path / "cache" / f"models--somebody--{name}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs/main").write_text(commit)
        (stored / "snapshots").mkdir()
    code, _, err = run(
        "convert", flashar_model, "--out", tmp_path / "cache/models--somebody--a-model/snapshots" / commit
    )
    assert code == 0, err
    (stored / "snapshots" / commit).mkdir()
    (stored / "snapshots" / commit / "config.json").write_text("{}")
    calls = []

    def recorded(real):
        def call(repository, *args, local_files_only, **options):
            calls.append((repository, *args, options.get("allow_patterns"), local_files_only))
            if local_files_only:
                return real(repository, *args, local_files_only=True, **options)
            raise hub.errors.LocalEntryNotFoundError("offline")

        return call

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(hub, name, recorded(getattr(hub, name)))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return calls


def test_a_repository_comes_from_the_cache(run, hub_cache):
    """Guards a run that goes to the network unasked, and a command that takes less than the pipeline."""
    assert FlashARPipeline.from_pretrained("somebody/a-model").grid == (8, 8)
    assert Path(locate("somebody/a-model/model.safetensors")).is_file()
    code, _, err = run("generate", "--checkpoint", "somebody/a-model", "--classes", "3", "--out", "drawn")
    assert code == 0, err
    assert [call[-1] for call in hub_cache] == [True] * 3
    Path("somebody/a-model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"somebody/a-model"):  # a local path comes first, even a wrong one
        FlashARPipeline.from_pretrained("somebody/a-model")
    assert len(hub_cache) == 3


def test_what_the_cache_lacks_is_fetched_only_where_asked(run, hub_cache):
    """Guards a mistyped path that goes to the network, and code that comes along with weights."""
    fetch = r"To fetch it: hf download somebody/{}, or add --download, in Python download=True"
    with pytest.raises(ValueError, match=r"the Hub cache \(.*cache\) does not hold it\. " + fetch.format("none")):
        FlashARPipeline.from_pretrained("somebody/none")
    with pytest.raises(ValueError, match=r"holds it without its weights\. " + fetch.format("half")):
        FlashARPipeline.from_pretrained("somebody/half")
    with pytest.raises(ValueError, match=r"does not hold it\. " + fetch.format("a-model")):
        FlashARPipeline.from_pretrained("somebody/a-model/c2i_B_256.pt")
    code, _, err = run(
        "evaluate", "--checkpoint", "somebody/none", "--reference", "x", "--features", "x", "--out", "eval"
    )
    assert code == 2
    assert "does not hold it" in err
    assert all(call[-1] for call in hub_cache)
    with pytest.raises(ValueError, match=r"no checkpoint somebody/none: .* as a repository .* offline"):
        FlashARPipeline.from_pretrained("somebody/none", download=True)
    code, _, err = run("generate", "--checkpoint", "somebody/none", "--download", "--classes", "3", "--out", "drawn")
    assert code == 2
    assert "offline" in err
    name, patterns, local = hub_cache[-1]
    assert (name, local) == ("somebody/none", False)
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", "*"))]


RAW = ("fit", "--config", "experiments/demo_flashar.yaml", "--data.shards")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("benchmark",), "--checkpoint"),
        (("doctor",), "--checkpoint"),
        (("plan",), "--checkpoint"),
        (("report", "--flashar", "x", "--out", "y", "--data"), "--raster"),
        (RAW, "--model.init_from"),
        ((*RAW[:3], "--model.init_from", "x.ckpt", "--data.shards"), "--model.backbone.directory"),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_download_means_the_same_in_every_command(run, hub_cache, shards, words, option):
    """Guards a command that goes to the network unasked, or has no way to be asked."""
    data = (shards,) if words[-1].startswith("--data") else ()
    for asked in (False, True):
        code, _, err = run(*words, *data, option, "somebody/none", *(["--download"] if asked else []))
        assert code == 2, err
        assert ("offline" if asked else "does not hold it") in err
        assert hub_cache[-1][-1] is not asked


def test_a_training_starts_from_the_cache(hub_cache):
    """Guards weights that only the commands that draw would find."""
    assert Path(initial_weights("somebody/a-model"), "model.safetensors").is_file()
    assert [call[-1] for call in hub_cache] == [True]


def test_a_wrong_path_is_no_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for path in ("runs/last", "no/such.ckpt", "/no/where", "model.safetensors", "./a/b"):
        with pytest.raises(ValueError, match=f"no checkpoint {path.removeprefix('./')}"):
            FlashARPipeline.from_pretrained(path)


# --- training from Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flashar": {"branch_layr": 1}}, ["--model.flashar.branch_layr", "1"]),
        ({"flashar": {"branch_layer": "x"}}, ["--model.flashar.branch_layer", "x"]),
        ({"flashar": {"fusion": "gate"}}, ["--model.flashar", "{fusion: gate}"]),
        ({"block_diffusion": {"strategy": "ring"}}, ["--model.block_diffusion.strategy", "ring"]),
        ({"optimiser": {"lr": "fast"}}, ["--model.optimiser.lr", "fast"]),
        ({"validation": {"plan": "spiral"}}, ["--model.validation.plan", "spiral"]),
    ],
)
def test_dictionaries_are_refused_in_the_words_of_a_yaml(options, words):
    """Guards TypeError and silence for what `flashar fit` explains."""
    with pytest.raises(ValueError, match=r"expected|closest|required") as by_yaml:
        ExperimentCLI("fit", ["--model.backbone.preset", "llamagen-b", *words], parse_only=True)
    with pytest.raises(ValueError, match=r"expected|closest|required") as by_python:
        FlashARModule(backbone={"preset": "llamagen-b"}, **options)
    assert str(by_python.value) == str(by_yaml.value)


def test_dictionaries_become_the_options_that_they_say():
    module = FlashARModule({"options": TINY | DIGITS}, {"branch_layer": 1}, optimiser={"lr": 1e-3, "betas": [0.5, 0.9]})
    assert (module.flashar.branch_layer, module.optimiser.lr, module.optimiser.betas) == (1, 1e-3, (0.5, 0.9))
    assert module.settings()["backbone"]["options"] == TINY | DIGITS
    baseline = FlashARModule({"options": TINY | DIGITS}, par={"tokens_per_step": 4})
    assert baseline.model_config["kind"] == "par"
    assert baseline.model_config["tokens_per_step"] == 4


def test_the_script_of_the_page_runs(work, capsys):
    """The page's experiment as it is written, but for its numbers of steps and width."""
    script = SCRIPTS[1]
    for shown, tiny in {"= 1500, 300": "= 2, 2", '"dim": 64': '"dim": 16'}.items():
        assert script.count(shown) == 1
        script = script.replace(shown, tiny)
    exec(compile(script, "docs/notebook.md", "exec"), {"__name__": "notebook"})
    assert Path("digits.png").is_file()
    assert "40 images in 15 steps each" in capsys.readouterr().out
    first = SCRIPTS[0].replace("runs/demo/flashar/checkpoints/last.ckpt", "flashar.ckpt").replace('"cuda"', '"cpu"')
    exec(compile(first, "docs/notebook.md", "exec"), {"__name__": "notebook"})
    assert Path("three.png").is_file()
