"""`FlashARPipeline`, and the module from Python: what docs/notebook.md shows."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from command_toys import DIGITS, TINY

from flashar_pl import FlashARPipeline
from flashar_pl.options import SampleOptions
from flashar_pl.training.lightning_cli import ExperimentCLI
from flashar_pl.training.module import FlashARModule

NOTEBOOK = (Path(__file__).parents[2] / "docs/notebook.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", NOTEBOOK, re.DOTALL)


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


def test_a_repository_is_fetched_by_its_name_and_a_wrong_path_is_not(flashar_model, monkeypatch, tmp_path):
    """Guards a mistyped path that goes to the network, and code that comes along with weights."""
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def fetched(name, allow_patterns):
        calls.append((name, allow_patterns))
        return flashar_model

    monkeypatch.setattr(hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    assert FlashARPipeline.from_pretrained("somebody/a-model").grid == (8, 8)
    [(name, patterns)] = calls
    assert name == "somebody/a-model"
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", "*"))]

    def missing(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match=r"no file or directory somebody/a-model, and as a repository .* offline"):
        FlashARPipeline.from_pretrained("somebody/a-model")
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
