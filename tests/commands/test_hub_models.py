"""Commands on directories in transformers' format: every family, from prompt to codes, with tiny random weights."""

import gc
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from hub_files import CODES, ROW_END, write_hub
from safetensors.torch import load_file, save_file

from flashar_pl.backbones import from_transformers
from flashar_pl.backbones.registry import presets
from flashar_pl.benchmarking.measure import GemmWalk
from flashar_pl.checkpoints.hub import hub_values, prompt_tokenizer
from flashar_pl.checkpoints.official import backbone_config
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.commands.generate import GenerateOptions, generate
from flashar_pl.commands.tokenize import tokenize_samples
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.decoding import generate as draw
from flashar_pl.models import FlashAR
from flashar_pl.options import EngineOptions, ModelOptions, SampleOptions, SamplingSettings, SplitOptions
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes, named_sizes
from flashar_pl.tokenizers.rank_text import RANKS, VISION_TOKENS, RankText

FAMILIES = ("emu3", "janus", "chameleon", "lumina_mgpt", "qwen2", "x_omni", "mammothmoda2")
BEGIN = 256
"""First special token; a byte of ASCII text is one token."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """The directory of a family, written once."""
    root, made = tmp_path_factory.mktemp("hub"), {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = write_hub(root / family, family, sharded=family == "janus")
        return made[family]

    return of


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """With transformers imported it takes half a second at every command."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


def spelled(ids: torch.Tensor, family: str = "") -> str:
    """Special tokens as <n>, n from 0; bytes as they are."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*map(chr, range(BEGIN))] if family == "mammothmoda2" else letters
    text = "".join(letters[i] if i < BEGIN else f"<{i - BEGIN}>" for i in ids.tolist())
    return text.replace("Ġ", " ").replace("Ċ", "\n")


PREFIXES = {
    "emu3": ("<0>a fox<1>2*4<2>", "<0>"),
    "janus": ("<0><|User|>: a fox\n\n<|Assistant|>:<1>", "<0><|User|>: \n\n<|Assistant|>:"),
    "chameleon": ("<0>a fox<1>", "<0>"),
    "lumina_mgpt": ("<0>Generate an image of 64x32 according to the following prompt:\na fox<2><1><4><5>", ""),
    "glm_image": ("a fox<0>2 4<1><0>11 22<1><2>", ""),
    "x_omni": ("a fox<0>2 4<1>", ""),
    "mammothmoda2": (
        "<1>system\nYou are a helpful image generator.<2>\n<1>user\na fox<2>\n<1>assistant\n<426>4*2<427>",
        "<1>assistant\n",
    ),
    "qwen2": ("a fox<0>", ""),
}
"""Of a prompt for 2 x 4 codes; of none."""


@pytest.mark.parametrize("family", [*FAMILIES, "glm_image"])
def test_prompts_are_written_as_the_family_does(hub, family: str) -> None:
    """Guards templates, sizes, the begin token, and special tokens typed by a user."""
    text = prompt_tokenizer(hub(family))
    whole, none = PREFIXES[family]
    assert spelled(text.conditions(["a fox"], (2, 4))[0], family) == whole
    assert spelled(text.unconditional(), family) == none
    typed = text.conditions(["<|image start|> <s> <racm3:break> <|image|>"], (2, 4))[0]
    assert (typed >= BEGIN).sum() == len(re.findall(r"<\d+>", whole))
    with pytest.warns(UserWarning, match="the limit is 90: the last"):
        cut = text.for_grid((2, 4)).prompt("a fox" + " in the snow" * 30, max_length=90, too_long="truncate")
    assert 80 < len(cut) <= 90
    with pytest.raises(ValueError, match="more than the limit of 90"):
        text.prompt("a fox" * 50, max_length=90)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_draws_what_the_state_dict_draws(hub, family: str, tmp_path: Path) -> None:
    """Guards reading shards, tied and renamed heads, the guidance and grid that are usual, and both orders."""
    directory = hub(family)
    for plan_name, branch in (("raster", None), ("diagonal", 1)):
        out = generate(
            GenerateOptions(prompt=["a fox"], num_images=2, out=str(tmp_path / plan_name), codes_only=True),
            ModelOptions(str(directory), grid="2x4", branch_layer=branch),
            SamplingSettings(cfg_scale=2.0 if family == "qwen2" else None),
            engine=EngineOptions(plan=plan_name, dtype="fp32", device="cpu"),
        )
        state = {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
        backbone = from_transformers(state, hub_values(directory))
        text = prompt_tokenizer(directory)
        null = torch.cat([text.unconditional(), text.image_prefix(2, 4)])
        if family == "janus":  # as transformers' own generate: every token but begin of text and image
            null = text.conditions(["a fox"], (2, 4))[0]
            null[1:-1] = 262
        codes = draw(
            backbone if branch is None else FlashAR(backbone, branch),
            text.conditions(["a fox"] * 2, (2, 4)),
            (2, 4),
            plan=plan_name,
            cfg_scale=backbone.published_cfg_scale or (2.0 if family == "qwen2" else 1.0),
            seeds=0,
            unconditional=[null, null],
        )
        assert np.array_equal(np.load(out / "codes.npy"), codes.numpy())
    assert open_checkpoint(ModelOptions(str(directory))).need_grid() == backbone.usual_grid


def test_glm_image_draws_its_preview_first(hub, tmp_path: Path) -> None:
    """Guards the order of both images, random numbers of their own, and where the preview stands in each row."""
    directory = hub("glm_image")
    out = generate(
        GenerateOptions(prompt=["a fox", "the snow"], num_images=1, out=str(tmp_path / "out"), codes_only=True),
        ModelOptions(str(directory), grid="2x4", branch_layer=1),
        SamplingSettings(cfg_scale=2.0),
        engine=EngineOptions(dtype="fp32", device="cpu"),
    )
    model = FlashAR(open_checkpoint(ModelOptions(str(directory))).model.backbone, 1)
    text = prompt_tokenizer(directory)
    prompts, nulls = text.conditions(["a fox", "the snow"], (2, 4)), text.conditions(["", ""], (2, 4))
    guided = {"cfg_scale": 2.0, "unconditional": nulls}
    smaller = draw(model, prompts, (11, 22), seeds=[2**40, 2**40 + 1], **guided).flatten(1)
    whole, none = ([torch.cat(pair) for pair in zip(each, smaller)] for each in (prompts, nulls))
    codes = draw(model, whole, (2, 4), seeds=0, cfg_scale=2.0, unconditional=none)
    assert np.array_equal(np.load(out / "codes.npy"), codes.numpy())
    with pytest.raises(ValueError, match="codes-only"):
        generate(GenerateOptions(prompt=["a fox"], out=str(tmp_path / "no")), ModelOptions(str(directory), grid="2x4"))


@pytest.mark.parametrize("family", ["glm_image", "x_omni"])
def test_samples_as_shards(hub, tmp_path: Path, family: str) -> None:
    """Guards the place of previews in shards, in a last partial batch too, and models whose image tokenizer runs
    elsewhere: those that have no other data."""
    model, out = ModelOptions(str(hub(family)), grid="2x4", branch_layer=1), tmp_path / "drawn"
    tokenize_samples(
        SampleOptions(prompt=["a fox", "snow", "ice"], num_images=1, seed=40), model, SplitOptions(out=str(out)),
        SamplingSettings(cfg_scale=1.0), engine=EngineOptions(dtype="fp32", device="cpu", batch_size=2),
    )  # fmt: skip
    found = ShardReader(Manifest.load(out), "train").read(np.arange(3))
    flashar, text = open_checkpoint(model).model, prompt_tokenizer(hub(family))
    for i, caption, codes in zip(found.ids.tolist(), found.texts, found.codes, strict=True):
        prompts = text.conditions([caption], (2, 4))
        if family == "glm_image":
            smaller = draw(flashar, prompts, (11, 22), seeds=2**40 + 40 + i)
            assert found.previews is not None
            assert np.array_equal(found.previews[found.ids == i], smaller.numpy())
            prompts = [torch.cat([*prompts, smaller.flatten()])]
        assert np.array_equal(draw(flashar, prompts, (2, 4), seeds=40 + i)[0].numpy(), codes)


def test_forwards_of_a_preview_are_not_those_of_the_image(hub, tmp_path: Path) -> None:
    """Guards the forwards of a lossless plan: those of the preview, of 242 codes, once stood for the image's 8."""
    engine = EngineOptions(dtype="fp32", device="cpu", plan="lossless")
    draws = GenerateOptions(prompt=["a fox"], num_images=1, out=str(tmp_path / "out"), codes_only=True)
    out = generate(
        draws, ModelOptions(str(hub("glm_image")), grid="2x4"), SamplingSettings(cfg_scale=1.0), engine=engine
    )
    assert json.loads((out / "settings.json").read_text())["settings"]["forwards"]["most"] <= 9  # the prefix's included


def test_images_come_from_the_models_own_tokenizer(hub, tmp_path: Path) -> None:
    """Guards the tokenizer that is taken where none is given, and the check of one that is."""
    draws = GenerateOptions(prompt=["a fox"], num_images=1, out=str(tmp_path / "out"))
    out = generate(draws, ModelOptions(str(hub("janus")), grid="3x3"))
    assert {path.suffix for path in out.iterdir()} == {".png", ".npy", ".json"}
    chameleon = ModelOptions(str(hub("chameleon")), grid="3x3")
    with pytest.raises(ValueError, match=r"no decoder in transformers; generate .* --codes-only"):
        generate(GenerateOptions(prompt=["a fox"], out=str(tmp_path / "no")), chameleon)
    with pytest.raises(ValueError, match=f"tokenizer has 17 codes, the model {CODES}"):
        generate(
            GenerateOptions(prompt=["a fox"], out=str(tmp_path / "no")),
            ModelOptions(str(hub("janus")), grid="3x3", tokenizer="pixels:17"),
        )


def test_codes_of_x_omni_stand_where_its_tokenizer_has_them(tmp_path: Path) -> None:
    """Guards the numbers of codes, were tokens of images to begin with others."""
    directory = write_hub(tmp_path / "x_omni", "x_omni")
    config, tokens = (json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer.json"))
    del config["visual_token_offset"]
    (directory / "config.json").write_text(json.dumps(config))
    for first, added in ((256, []), (258, [{**tokens["added_tokens"][-1], "content": "<MM-Token-0>", "id": 258}])):
        tokens["added_tokens"] += added
        (directory / "tokenizer.json").write_text(json.dumps(tokens))
        assert backbone_config(directory, "visual")["visual_token_offset"] == first


def test_simplear_codes_follow_the_tokenizer(tmp_path: Path) -> None:
    """Guards a family that config.json names by its architecture alone, and codes that it does not place."""
    directory = write_hub(tmp_path / "simplear", "simplear")
    backbone = open_checkpoint(ModelOptions(str(directory))).model.backbone
    assert (backbone.config.visual_token_offset, backbone.vocabulary) == (BEGIN + 2, 64000)
    text = prompt_tokenizer(directory)
    assert spelled(text.conditions(["a fox"], (2, 4))[0]) == "<0>A highly realistic image of a fox<1>"
    assert spelled(text.unconditional()).startswith("<0>An image of aerial view, overexposed")


def test_what_does_not_fit_is_named_before_long_work(hub, tmp_path: Path) -> None:
    directory = write_hub(tmp_path / "qwen2", "qwen2")
    config = json.loads((directory / "config.json").read_text())

    def refused(**changes: object) -> str:
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError) as error:
            open_checkpoint(ModelOptions(str(directory)))
        (directory / "config.json").write_text(json.dumps(config))
        return str(error.value)

    assert "known: emu3, janus, chameleon, lumina_mgpt, glm_image, mammothmoda2" in refused(model_type="mystery")
    assert "like those of qwen2" in refused(model_type="mystery")
    assert "it is Janus as its authors saved it" in refused(model_type="multi_modality")
    assert "does not say which tokens are codes; add visual_token_offset" in refused(visual_token_offset=None)
    state = load_file(directory / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    for changed, said in (
        ({key: value for key, value in state.items() if key != bias}, rf"1 missing keys \({bias}\)"),
        ({**state, "model.extra": torch.zeros(1)}, r"1 unknown keys \(model.extra\)"),
    ):
        save_file(changed, directory / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            open_checkpoint(ModelOptions(str(directory)))
    janus = write_hub(tmp_path / "janus", "janus")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (janus / name).write_text((directory / name).read_text())
    with pytest.raises(ValueError, match="has no token <｜begin▁of▁sentence｜>, which prompts of this model need"):
        prompt_tokenizer(janus)
    with pytest.raises(ValueError, match=r"token ids up to 25., the model 200 tokens; expected the"):
        prompt_tokenizer(hub("emu3")).check_vocabulary(200, None)


def test_published_sizes_have_the_parameters_that_their_names_state() -> None:
    """Guards presets: they are in the list of every command, and the planner and the benchmark size them."""
    for name, billions in (
        ("emu3-8b", 8.49), ("janus-pro-1b", 1.49), ("janus-pro-7b", 6.59), ("lumina-mgpt-7b", 7.01),
        ("simplear-0.5b", 0.74), ("simplear-1.5b", 1.97), ("glm-image-9b", 8.91), ("x-omni-7b", 9.60),
        ("mammothmoda2-preview", 10.70),
    ):  # fmt: skip
        sizes = named_sizes(name, None, None)
        assert (sizes.parameters["backbone"] + sizes.parameters["horizontal_head"]) / 1e9 == pytest.approx(
            billions, abs=0.01
        )
        assert sizes.backbone.usual_grid == presets()[name].published[name].usual_grid


def test_mammothmoda2s_own_files_are_read_and_checked(tmp_path: Path) -> None:
    """Guards ids that follow the ranks, and what a damaged or another model's file would do to every prompt."""
    directory = write_hub(tmp_path / "model", "mammothmoda2")
    text, values = prompt_tokenizer(directory), hub_values(directory)
    assert values["boi_token_id"] == 256 + 426
    text.check_vocabulary(ROW_END + 40, ROW_END + 8)
    with pytest.raises(ValueError, match=f"has code 0 at token {ROW_END + 8}, the model at {ROW_END + 9}"):
        text.check_vocabulary(ROW_END + 40, ROW_END + 9)
    places = {"visual_token_start_id": 9, "visual_token_end_id": 16, "eol_token_id": 5}
    (directory / "t2i_generation_config.json").write_text(json.dumps(places))
    found = {key: value for key, value in hub_values(directory).items() if key in ("num_visual_codes", "eol_token_id")}
    assert found == {"num_visual_codes": CODES, "eol_token_id": 5}  # config.json wins
    named, ranks = (directory / name for name in (VISION_TOKENS, RANKS))
    whole, words = named.read_text(), ranks.read_text()
    for file, content, said in (
        (named, whole + "\n<|im_end|>", "holds '<|im_end|>'; expected a new name such as"),
        (named, whole + "\nimport os", "holds 'import os'; expected a new name such as"),
        (named, whole + "\n<|image start|>", "holds 34 names, 33 different ones"),
        (named, "x" * 2_000_000, "has 2,000,000 bytes; expected 1,048,576 at most"),
        (ranks, words + "\nx y", "line 257: b'x y' is not a base64 word and its rank"),
        (ranks, "\n".join(words.splitlines()[1:]), "holds 255 words whose ranks are not 0"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=re.escape(said)):
            RankText(directory)
        named.write_text(whole)
        ranks.write_text(words)


@pytest.mark.parametrize("family", ["mammothmoda2", "x_omni"])
def test_tokens_of_images_apart_can_be_measured(hub, family: str) -> None:
    """`benchmark` failed for both presets: MLPs of text were walked at every step, random prompts ended with text."""
    model = FlashAR(open_checkpoint(ModelOptions(str(hub(family)))).model.backbone, 1)
    job = DecodeJob(model_sizes(model.config()), "diagonal", (2, 4))
    walk = GemmWalk(model, job)
    assert all(walk.calls(forward.gemms) for forward in job.forwards)
    assert draw(model, model.backbone.conditioning.example(2), (2, 4), greedy=True).shape == (2, 2, 4)


def test_a_tokenizer_that_nobody_gave_is_no_emu35s(hub) -> None:
    """Runs on ready codes note a kind without weights: X-Omni's were sent to Emu3.5's image tokenizer."""
    source = open_checkpoint(ModelOptions(str(hub("x_omni"))))
    source.tokenizer = {"kind": "ibq"}
    with pytest.raises(
        ValueError, match=r"does not say which tokenizer decodes its codes; add --tokenizer .* --codes-on"
    ):
        source.need_tokenizer()
