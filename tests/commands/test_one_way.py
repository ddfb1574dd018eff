"""The same option everywhere: spelling, names, suggestions, and examples that can be pasted."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from command_toys import DIGITS, TINY

from flashar_pl import FlashARPipeline, cli
from flashar_pl.backbones import LlamaGen
from flashar_pl.commands.arguments import build_parser, options_of, parse
from flashar_pl.options import EngineOptions, SamplingSettings, ShapeOptions, TextOptions
from flashar_pl.training.lightning_cli import DATA, VERBS, ExperimentCLI
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.words import Words, check_keys

TYPED = [name for name, command in cli.COMMANDS.items() if not command.trains]
DEMO = str(Path(__file__).parents[2] / "experiments/demo_flashar.yaml")


def pasted(text: str) -> list[list[str]]:
    """The words of each command in a help text, as a shell has them."""
    lines = re.findall(r"^ +((?:flashar|torchrun) .*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("name", TYPED)
def test_every_example_of_a_help_can_be_pasted(name):
    """Guards examples with options of yesterday."""
    found = pasted(build_parser(cli.load(cli.COMMANDS[name]), f"flashar {name}").format_help().split("example:")[1])
    assert found
    for words in found:
        words = (
            words[words.index("flashar") + 1 :] if "flashar" in words else words[words.index("flashar_pl.cli") + 1 :]
        )
        verb, rest = cli.split_verb(words)
        parse(cli.load(cli.COMMANDS[verb]), f"flashar {verb}", rest)


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_of_a_training_verb_can_be_pasted(verb, monkeypatch):
    """Guards remarks in brackets, which a shell takes for a subshell."""
    monkeypatch.chdir(Path(DEMO).parents[1])
    found = pasted(VERBS[verb])
    assert found
    for _, asked, *words in found:
        assert asked == verb
        assert not any("(" in word for word in words)
        if "--checkpoint" in words:  # it holds the settings of its run
            words = ["--config", DEMO]
        if not any(word.endswith("help") for word in words[:1]):
            ExperimentCLI(verb, words, parse_only=True)


def test_the_first_help_can_be_pasted():
    examples = pasted(cli.HELP.split("start here:")[1])
    assert len(examples) == 3
    for words in examples:
        verb, rest = cli.split_verb(words[1:])
        if not cli.COMMANDS[verb].trains:
            parse(cli.load(cli.COMMANDS[verb]), f"flashar {verb}", rest)


@pytest.mark.parametrize("name", TYPED)
def test_a_slip_of_the_finger_is_answered_with_the_right_option_first(name):
    """Guards suggestions in which the right one comes last, or not at all."""
    function = cli.load(cli.COMMANDS[name])
    known = [option.typed for option in options_of(function) if not option.positional]
    for option in known:
        for slip in {option[:3] + option[4:], option + option[-1]}:
            if slip in known or len(option) < 7:
                continue
            with pytest.raises(ValueError, match="has no option") as error:
                parse(function, f"flashar {name}", [slip])
            first = str(error.value).split("did you mean ")[1].split()[0].rstrip("?")
            assert first == option, slip


def test_dashes_and_underscores_are_the_same():
    """Guards the one spelling of typed commands and the other of `fit`."""
    function = cli.load(cli.COMMANDS["generate"])
    given = ["--checkpoint", "a_b-c", "--out", "o", "--classes", "1"]
    dashed = parse(function, "flashar generate", [*given, "--num-images", "3", "--cfg-scale=2", "--codes-only"])
    assert parse(function, "flashar generate", [*given, "--num_images", "3", "--cfg_scale=2", "--codes_only"]) == dashed
    assert parse(function, "g", ["--ckpt_path", *given[1:]]) == parse(function, "g", given)
    dashed = ExperimentCLI(
        "fit", ["--config", DEMO, "--trainer.max-steps", "7", "--model.flashar.branch-layer=2"], True
    )
    assert dashed.values["trainer"]["max_steps"] == 7
    assert dashed.values["model"]["flashar"]["branch_layer"] == 2
    assert Words.read(["--ckpt-path", "a-b"]).given("ckpt_path") == "a-b"
    assert Words.read(["--checkpoint=a-b"]).given("ckpt_path") == "a-b"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["generate", "--guidance_scale", "2"], "did you mean --cfg-scale?"),
        (["generate", "--model", "x"], "did you mean --checkpoint?"),
        (["generate", "--output", "x"], "did you mean --out?"),
        (["generate", "--class", "3"], "did you mean --classes?"),
        (["generate", "--cfg", "3"], "did you mean --cfg-scale?"),
        (["score", "--batch", "3"], "did you mean --batch-size?"),
    ],
)
def test_words_of_other_programs_are_known(typed, meant, refused):
    assert meant in refused(*typed)


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("lr", "model.optimiser.lr"),
        ("trainer.lr", "model.optimiser.lr"),
        ("learning_rate", "model.optimiser.lr"),
        ("max_steps", "trainer.max_steps"),
        ("max_step", "trainer.max_steps"),
        ("epochs", "trainer.max_epochs"),
        ("batch_size", "data.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("model.branch_layer", "model.flashar.branch_layer"),
        ("model.optimizer.lr", "model.optimiser.lr"),
        ("cfg_scale", "model.validation.cfg_scale"),
        ("seed", "seed_everything"),
        ("out", "trainer.default_root_dir"),
    ],
)
def test_keys_of_a_run_are_suggested_where_they_are(typed, first):
    with pytest.raises(ValueError, match=rf"no configuration key '{typed}'; closest: {first}[,.]"):
        check_keys(Words.read([f"--{typed}", "1"]), FlashARModule, DATA)


# --- guidance ------------------------------------------------------------------------------------------------------


def test_guidance_is_the_models_own_where_nothing_is_said(run, flashar_model, work, monkeypatch):
    """Guards a default of one command: GenEval drew with 5 what `generate` drew with 1."""
    model = LlamaGen
    for usual, expected in ((None, 1.0), (3.0, 3.0)):
        monkeypatch.setattr(model, "published_cfg_scale", usual)
        code, _, err = run("generate", "--checkpoint", flashar_model, "--classes", 3, "--out", f"drawn{usual}")
        assert code == 0, err
        assert json.loads(Path(f"drawn{usual}/settings.json").read_text())["settings"]["cfg_scale"] == expected
        drawn = FlashARPipeline.from_pretrained(flashar_model)(3, progress=False)
        assert drawn.settings["cfg_scale"] == expected
        assert drawn.codes.tolist() == np.load(f"drawn{usual}/codes.npy").tolist()
        module = FlashARModule({"options": TINY | DIGITS})
        assert module.validation.cfg_scale == expected
        assert FlashARModule({"options": TINY | DIGITS}, validation={"cfg_scale": 2.0}).validation.cfg_scale == 2.0
    assert np.load("drawnNone/codes.npy").tolist() != np.load("drawn3.0/codes.npy").tolist()


def test_every_command_has_one_default_for_each_option():
    """Guards two defaults of one option; what differs says so in its help, as `evaluate`'s tokenizer batch does."""
    shared = SamplingSettings, EngineOptions, ShapeOptions, TextOptions
    defaults = {field.name: field.default for group in shared for field in fields(group)}
    for name in TYPED:
        for option in options_of(cli.load(cli.COMMANDS[name])):
            if option.name in defaults and not name.startswith("tokenize"):
                assert option.default == defaults[option.name], f"{name} {option.typed}"
