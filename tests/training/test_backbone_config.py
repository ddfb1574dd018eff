"""The `backbone` part of a YAML for Emu3.5: preset, sizes, or the directory of released weights."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from flashar_pl.backbones import describe_backbone
from flashar_pl.checkpoints.description import build_on_meta
from flashar_pl.checkpoints.initialise import initialise
from flashar_pl.training.checks import check_guidance
from flashar_pl.training.config import (
    BackboneConfig,
    FlashARConfig,
    ValidationConfig,
    model_config,
    plain_settings,
    typed_settings,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {
    "dim": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 48, "vocab_size": 60,
    "rope_base": 1e4, "norm_eps": 1e-6, "visual_token_offset": 20, "eol_token_id": 3, "boi_token_id": 4,
}  # fmt: skip


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The golden base model as its authors publish it."""
    values = json.loads((GOLDEN / "emu35" / "emu_tiny.json").read_text())["config"]
    shutil.copyfile(GOLDEN / "emu35" / "emu_tiny_state.safetensors", tmp_path / "model.safetensors")
    ids = {"eol_token_id": 120, "eoi_token_id": 127, "boi_token_id": 126}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Emu3", **values, **ids}))
    return tmp_path


def test_the_preset_drops_captions_for_the_official_unconditional_prompt() -> None:
    """Without the ids a run with caption dropout, which guidance needs, could not be described by a YAML alone."""
    config = BackboneConfig(preset="emu35-34b", options={"condition_dropout": 0.1}).resolve()
    published = json.loads((GOLDEN / "text" / "prompt_ids.json").read_text())["unconditional"]["ids"]
    assert list(config["unconditional_prompt"]) == published
    assert BackboneConfig(preset="emu35-34b").resolve() == config, "a tenth is the default"
    assert (config["kind"], config["heads"], config["condition_dropout"]) == ("emu35", "visual", 0.1)


def test_captions_are_dropped_by_default_where_the_prompt_is_known() -> None:
    """FlashAR post-training without dropped captions would leave the vertical branch without an unconditional mode."""
    options = {**SIZES, "unconditional_prompt": [1, 2]}
    assert BackboneConfig(kind="emu35", options=SIZES).resolve()["condition_dropout"] == 0
    assert BackboneConfig(kind="emu35", options=options).resolve()["condition_dropout"] == 0.1
    off = BackboneConfig(preset="emu35-34b", options={"condition_dropout": 0.0})
    assert off.resolve()["condition_dropout"] == 0


def test_sizes_in_options_build_the_model_and_survive_a_checkpoint() -> None:
    options = {**SIZES, "condition_dropout": 0.5, "unconditional_prompt": [1, 2]}
    backbone = BackboneConfig(kind="emu35", options=options)
    described = model_config(backbone, FlashARConfig(branch_layer=1))
    assert json.loads(json.dumps(described)) == described, "a checkpoint holds plain types"
    model = build_on_meta(described)
    assert model.config() == described | {"vertical_layers": 1}
    assert model.dual_head.horizontal.weight.shape == (40, 32), "visual heads are the default of training"
    assert BackboneConfig(kind="emu35", options={**options, "heads": "full"}).resolve()["heads"] == "full"
    plain = plain_settings({"backbone": backbone, "optimiser": {"betas": [0.9, 0.95]}})
    assert plain["backbone"] == {"kind": "emu35", "options": options, "preset": None, "directory": None}
    assert typed_settings(plain | {"optimiser": {"betas": [0.9, 0.95]}})["backbone"] == backbone


def test_a_directory_gives_the_sizes_and_fits_its_own_weights(released: Path) -> None:
    """Epsilon and RoPE base are the file's: a run that assumed them would be refused by its own weights."""
    backbone = BackboneConfig(directory=str(released), options={"dropout": 0.1})
    config = backbone.resolve()
    assert (config["heads"], config["dropout"], config["unconditional_prompt"]) == ("visual", 0.1, None)
    model = build_on_meta(model_config(backbone, FlashARConfig(branch_layer=3)))
    assert initialise(model, released).cloned > 0


def test_a_directory_with_the_rank_file_gives_the_unconditional_prompt(released: Path) -> None:
    pytest.importorskip("tiktoken")
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (released / "emu3.tiktoken").write_bytes(ranks)
    config = BackboneConfig(directory=str(released), options={"condition_dropout": 0.1}).resolve()
    assert bytes(config["unconditional_prompt"][1:-1]) == b"You are a helpful assistant. USER:  ASSISTANT: "


def test_guided_validation_needs_an_unconditional_prompt() -> None:
    """Otherwise the run would stop at its first validation, hours after its start."""
    config = describe_backbone(BackboneConfig(kind="emu35", options=SIZES).resolve())
    with pytest.raises(ValueError, match=r"validation\.cfg_scale is 5.*unconditional_prompt"):
        check_guidance(config, ValidationConfig(cfg_scale=5.0, grid_images=1))
    check_guidance(config, ValidationConfig(cfg_scale=1.0, grid_images=1))
    check_guidance(config, ValidationConfig(cfg_scale=5.0, grid_images=0))
    for preset in ("emu35-34b", "llamagen-b"):
        known = describe_backbone(BackboneConfig(preset=preset).resolve())
        check_guidance(known, ValidationConfig(cfg_scale=5.0, grid_images=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "emu35-34b", "options": {"droput": 0.1}}, "no option 'droput'; did you mean dropout"),
        ({"kind": "emu35", "options": {"dim": 8, "n_layer": 1}}, "needs n_head, n_kv_head"),
        ({"kind": "emu35", "preset": "llamagen-b"}, "llamagen-b is of kind llamagen"),
        ({"directory": "nowhere"}, "no file nowhere/config.json"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BackboneConfig(**values).resolve()


def test_a_preset_stands_in_for_a_directory_that_is_not_there(released: Path, tmp_path: Path) -> None:
    """Guards a plan that needs 68 GB of weights, and sizes of a preset where the weights say others."""
    assert BackboneConfig(preset="emu35-34b", directory=str(tmp_path / "nowhere")).resolve()["n_layer"] == 64
    both = BackboneConfig(preset="emu35-34b", directory=str(released)).resolve()
    assert both == BackboneConfig(directory=str(released)).resolve()
