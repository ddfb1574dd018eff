"""Every YAML in experiments/ parses, instantiates, builds the model its name says and fits the hardware it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from flashar_pl.backbones import describe_backbone
from flashar_pl.cli import main
from flashar_pl.commands.plan import HardwareOptions, RunOptions, plan
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.training import planned
from flashar_pl.training.checks import check_features, how_to_make, initial_weights
from flashar_pl.training.config import TYPES, BackboneConfig
from flashar_pl.training.module import FlashARModule

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))
DIGITS = {"dim": 8, "n_layer": 1, "n_head": 1, "vocab_size": 17, "num_classes": 10}
LLAMAGEN = {"b": 110_888_448, "l": 342_910_976, "xl": 774_699_520, "xxl": 1_410_972_672}
"""Published parameter counts."""


def parse(path: Path, *overrides: str) -> LightningCLI:
    """The configuration as `flashar fit` reads it, on hardware that every machine has."""
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"]
    named = "class_path" in yaml.safe_load(path.read_text())["data"]
    return LightningCLI(
        FlashARModule, CodesDataModule, subclass_mode_data=named, run=False, auto_configure_optimizers=False,
        args=["--config", str(path), *overrides, *here],
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_instantiates_and_is_planned(path: Path, monkeypatch, capsys) -> None:
    """On the meta device: no memory for weights, whatever the size. And as its header says on 8 H20 with 96 GB."""
    cli = parse(path)
    values = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    monkeypatch.setattr(planned, "parsed_config", lambda words: values)  # parsed once
    result = plan(RunOptions(config=str(path)), HardwareOptions(gpus=1 if path.stem.startswith("demo") else 8))
    assert sum(result["parameters"].values()) > 1000
    assert "GPU-hours" in capsys.readouterr().out
    assert result["fits"]
    said = re.search(r"# Time: about ([\d.]+) h \(([\d,]+) GPU-hours\)", path.read_text())
    if said:
        time = [float(number.replace(",", "")) for number in said.groups()]
        assert time == pytest.approx([result["time"]["hours"], result["time"]["gpu_hours"]], rel=0.03), "its header"
    assert said or path.stem.endswith("streamed") or not path.stem.startswith("llamagen")
    with torch.device("meta"):
        cli.model.configure_model()
    net = cli.model.net
    assert {p.device.type for p in net.parameters()} == {"meta"}
    published = re.match(r"llamagen_(b|l|xl|xxl)_(256|384)", path.stem)
    if published:
        size, resolution = published.groups()
        roles = net.roles()
        counts = {n: p.numel() for n, p in net.named_parameters() if roles[n] in ("backbone", "horizontal_head")}
        assert sum(counts.values()) == LLAMAGEN[size]
        assert net.branch_layer == net.backbone.n_layer - 1
        assert cli.model.init_from == f"weights/c2i_{size.upper()}_{resolution}.pt"
        assert cli.model.validation.cfg_scale == 2.0
        assert cli.model.optimiser.lr == 2e-5
        images = cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches  # of an optimiser step
        assert (images, cli.trainer.max_epochs) == (512, 25)
        assert cli.datamodule.location.endswith(resolution)


def overridden() -> list[Any]:
    """(file, overrides) of every command in a header that asks its file for another size."""
    found = []
    for path in FOLDER.glob("*_llamagen*.yaml"):
        commands = re.findall(rf"^# +flashar fit --config experiments/{path.name} +(--.+)$", path.read_text(), re.M)
        found += [pytest.param(path, line.split(), id=f"{path.stem}:{line.split()[-1]}") for line in commands]
    return found


@pytest.mark.parametrize(("path", "overrides"), overridden())
def test_sizes_of_a_header_are_built(path: Path, overrides: list[str]) -> None:
    """One file serves all published sizes: branch layer, batch, shards and directory must fit the size asked for."""
    cli = parse(path, *overrides)
    with torch.device("meta"):
        cli.model.configure_model()
    net, data, place = cli.model.net, cli.datamodule, cli.trainer.default_root_dir
    assert getattr(net, "branch_layer", net.backbone.n_layer) == net.backbone.n_layer
    assert data.batch_size * cli.trainer.accumulate_grad_batches == (512 if "post" in path.stem else 256)
    if size := re.search(r"_(b|l|xl|xxl)(_16)?_(256|384)$", place):
        in_backbone = sum(p.numel() for name, p in net.named_parameters() if name.startswith("backbone."))
        head = net.dual_head.horizontal.weight.numel() if "dual_head" in dict(net.named_children()) else 0
        assert in_backbone + head == LLAMAGEN[size[1]]
    assert data.location.endswith(place[-3:])


COMMANDS = {
    "data/digits": "flashar tokenize digits --out data/digits",
    "data/moving_digits": "flashar tokenize moving-digits --out data/moving_digits",
    "data/scenes": "flashar tokenize scenes --out data/scenes",
    "data/mine": "flashar tokenize images photos --out data/mine",
    "data/emoji": "flashar tokenize images data/emoji_png --out data/emoji --image-size 32 --downsample 4 --steps 1200",
    "data/text_image/32x32": "flashar tokenize text-image --data text_to_image.json --crop square --out "
    "data/text_image --weights weights/Emu3.5-VisionTokenizer",
    "data/emu35_tiny/shards": "python tests/training/emu_tiny_data.py data/emu35_tiny",
}  # fmt: skip
COMMANDS |= {
    f"data/imagenet_{size}": f"flashar tokenize imagenet --images imagenet/train --image-size {size} --ten-crop --out "
    f"data/imagenet_{size} --weights weights/vq_ds16_c2i.pt"
    for size in (256, 384)
}
COMMANDS |= {
    f"data/{name}/{grid}": f"flashar tokenize text-image --data text_to_image.json --weights weights/{weights} "
    f"--buckets {grid} --out data/{name}"
    for name, grid, weights in (
        ("emu3_gen_8b", "90x90", "Emu3-Gen-hf"),
        ("janus_pro_1b", "24x24", "Janus-Pro-1B"),
        ("lumina_mgpt_7b", "48x48", "Lumina-mGPT-7B-768"),
        ("glm_image_ar", "32x32", "GLM-Image-AR"),
    )
}
COMMANDS |= {
    f"data/{name}/{grid}": f'flashar tokenize text-image --data "tars/{{00000..00099}}.tar" --out data/{name} '
    f"--vocabulary {codes}"
    for name, grid, codes in (
        ("simplear_0.5b", "64x64", 64000),
        ("x_omni_7b", "72x72", 16384),
        ("mammothmoda2_ar", "64x64", 16384),
    )
}
STARTS = {
    "weights/Emu3-Gen-hf": "from https://huggingface.co/BAAI/Emu3-Gen-hf to weights/",
    "weights/Janus-Pro-1B": "from https://huggingface.co/deepseek-community/Janus-Pro-1B to weights/",
    "weights/Lumina-mGPT-7B-768": "from https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-768 to weights/",
    "weights/SimpleAR-0.5B": "from https://huggingface.co/Daniel0724/SimpleAR-0.5B-RL to weights/",
    "weights/GLM-Image-AR": "from https://huggingface.co/zai-org/GLM-Image to weights/",
    "weights/X-Omni-En": "from https://huggingface.co/X-Omni/X-Omni-En to weights/",
    "weights/MammothModa2-Preview": "from https://huggingface.co/bytedance-research/MammothModa2-Preview to weights/",
    "weights/Emu3.5-Image": "Download Emu3.5-Image from https://huggingface.co/BAAI/Emu3.5-Image to weights/",
    "runs/demo/raster/checkpoints/last.ckpt": "flashar fit --config experiments/demo_raster.yaml",
    "runs/own/raster/checkpoints/best.ckpt": "flashar fit --config experiments/own_images.yaml",
    "runs/emoji/raster/checkpoints/best.ckpt": "flashar fit --config experiments/emoji_raster.yaml",
    "runs/video/raster/checkpoints/last.ckpt": "flashar fit --config experiments/video_raster.yaml",
    "runs/scenes/raster/checkpoints/last.ckpt": "flashar fit --config experiments/scenes_raster.yaml",
}


def first_error(call, *arguments) -> str:
    with pytest.raises(ValueError, match=r"no file|nothing at") as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_missing_is_made_by_the_command_of_this_recipe(path: Path, monkeypatch, tmp_path) -> None:
    """Guards the recipe of 34 B that told people to make digits, and to run the demo for its weights."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(path.read_text())
    model, data = content["model"], content["data"]
    shards = data.get("init_args", data)["shards"]
    options = {"preset", "directory", "kind", "options"}
    backbone = BackboneConfig(**{name: value for name, value in model["backbone"].items() if name in options})
    if shards in ("data/digits", "data/scenes", "data/mine"):  # sizes of the model come from the shards
        shown = how_to_make(shards, describe_backbone({"kind": "llamagen", **DIGITS}))
    else:
        shown = how_to_make(shards, describe_backbone(backbone.resolve()))
    assert shown == COMMANDS[shards]
    if (start := model.get("init_from")) is not None and "emu35_tiny" not in start:
        assert STARTS.get(start, "from https://huggingface.co/FoundationVision/LlamaGen") in first_error(
            initial_weights, start
        )
    if (features := (model.get("validation") or {}).get("features")) is not None:
        published = "inception" in features
        wanted = "Download weights-inception" if published else f"flashar classifier --data {shards} --out {features}"
        assert wanted in first_error(check_features, features, shards)


def test_a_folder_of_pictures_is_known_by_a_look_at_some(tmp_path, monkeypatch) -> None:
    """A fit that was given the million files of ImageNet for its shards would list them all before it refuses."""
    seen = []

    def glob(place: Path, pattern: str):
        for number in range(5000):
            seen.append(number)
            yield place / f"{number}.jpg"

    monkeypatch.setattr(Path, "glob", glob)
    shown = how_to_make(str(tmp_path / "my photos"), describe_backbone({"kind": "llamagen", **DIGITS}))
    assert shown.startswith(f"flashar tokenize images '{tmp_path}/my photos' --out data/mine")
    assert len(seen) <= 1001


def test_a_fit_without_shards_says_the_command_of_its_recipe(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main(["fit", "--config", "experiments/emu35_34b.yaml", *words]) == 2
    err = capsys.readouterr().err
    assert f"Make them: {COMMANDS['data/text_image/32x32']}" in err
    assert "digits" not in err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_says_how_on_what_and_what_comes_out(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"flashar fit --config experiments/{path.name}" in header
    for word in ("Hardware:", "Time:", "Expected"):
        assert word in header, word
    if re.match(r"llamagen_xx?l_256", path.stem):
        assert re.search(r"publish no XX?L weights for 256 x 256", header)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_holds_overrides_only(path: Path) -> None:
    """A value that repeats a default would silently keep it when the default changes."""
    model: dict[str, Any] = yaml.safe_load(path.read_text())["model"]
    for part, kind in TYPES.items():
        defaults = {name: getattr(kind, name, None) for name in kind.__dataclass_fields__}
        for name, value in (model.get(part) or {}).items():
            assert value != defaults[name], f"{part}.{name}"


@pytest.mark.parametrize("path", sorted((FOLDER / "authors").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_authors_settings_go_over_the_recipe_of_that_name(path: Path) -> None:
    """Their options arrive: a schedule, losses and an optimiser that the recipe does not have, and its sizes stay."""
    cli, plain = parse(FOLDER / path.name, "--config", str(path)), parse(FOLDER / path.name).model
    module, emu = cli.model, "emu" in path.stem
    assert module.schedule.build(20000).scale("gate", 20000) > 0 == plain.schedule.build(20000).scale("gate", 20000)
    distilled = {"aux_weight": (0.0, 0.05), "distillation": 0.2, "temperature": 2.0}
    assert module._loss_options == (distilled if emu else {"aux_weight": (0.0, 0.0), "gate_collapse": 0.1})
    assert plain._loss_options == {"aux_weight": 0.05}
    assert (module.optimiser.decay_vectors, plain.optimiser.decay_vectors) == (emu, False)
    assert (module.flashar.branch_layer, module.init_from) == (plain.flashar.branch_layer, plain.init_from)
    assert module.flashar.fusion == ("gate" if emu else "logit_gate")
    assert cli.trainer.max_steps == (20000 if emu else 75000)


@pytest.mark.parametrize(
    ("losses", "flashar", "message"),
    [
        ({"gate_collapse": 0.1}, {"branch_layer": 1, "fusion": "average"}, "needs a gate"),
        ({"vertical": 0.1}, None, "give model.flashar"),
        ({"gate_collapse": -1.0}, {"branch_layer": 1}, "weights of 0 or more"),
        ({"temperature": 3.0}, {"branch_layer": 1}, "set model.losses.distillation"),
    ],
)
def test_losses_that_would_do_nothing_are_refused(losses: dict, flashar: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashARModule(backbone={"options": DIGITS}, flashar=flashar, losses=losses)
