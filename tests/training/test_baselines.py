"""PAR and BlockDiffusion through FlashARModule: trained, validated, resumed, reloaded, drawn from by the commands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training_toys import (
    BackboneConfig,
    FlashARConfig,
    Losses,
    ValidationConfig,
    fit,
    make_module,
    save_classifier,
)

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.cli import main
from flashar_pl.decoding import Engine
from flashar_pl.models.baselines import PAR, BlockDiffusion
from flashar_pl.training.config import BlockDiffusionConfig, PARConfig
from flashar_pl.training.module import FlashARModule

METHODS: dict[str, dict[str, Any]] = {
    "par": {"par": PARConfig()},
    "authors": {"block_diffusion": BlockDiffusionConfig(strategy="row", steps=2)},
    "clean": {"block_diffusion": BlockDiffusionConfig(strategy="sub4x4", clean_context=True, steps=3)},
}
CLASSES = {"par": PAR, "authors": BlockDiffusion, "clean": BlockDiffusion}


def module_of(method: str, **overrides: Any) -> FlashARModule:
    return make_module(flashar=False, **METHODS[method], **overrides)


@pytest.mark.parametrize("method", METHODS)
def test_trained_validated_resumed_and_read_again(
    tmp_path: Path, toy_shards: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A continued run has the losses of the one that was never stopped, noise included; its checkpoint gives the
    module, the model with all options, samples of the engine, and what the commands draw and score."""
    shows = ValidationConfig(grid_images=3, cfg_scale=1.5)
    runs = {"max_steps": 4, "limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    whole, rest = Losses(), Losses()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit(tmp_path, toy_shards, module_of(method, validation=shows), callbacks=[whole, save],
                 enable_checkpointing=True, **runs)  # fmt: skip
    before = tmp_path / "step=2.ckpt"
    continued = fit(tmp_path, toy_shards, module_of(method, validation=shows), before, callbacks=[rest], **runs)
    assert rest.seen == {step: whole.seen[step] for step in (3, 4)}
    weights = module.net.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in continued.net.state_dict().items())

    path = str(tmp_path / "step=4.ckpt")
    loaded = load_model(path).model
    assert type(loaded) is CLASSES[method]
    assert FlashARModule.load_from_checkpoint(path).net.config() == loaded.config() == module.net.config()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    classes = torch.tensor([0, 1, 2])
    drawn = Engine(loaded).generate(classes, (4, 4), loaded.plan_name, seeds=3, cfg_scale=1.5)
    assert torch.equal(drawn, loaded.generate(classes, grid=(4, 4), seeds=3, cfg_scale=1.5))
    started = module_of(method, init_from=path)
    started.configure_model()
    started.load_initial_weights()
    assert all(torch.equal(value, weights[key]) for key, value in started.net.state_dict().items())

    out = tmp_path / "drawn"
    assert main(["generate", "--checkpoint", path, "--classes", "0,1,2", "--num-images", "1", "--seed", "3",
                 "--cfg-scale", "1.5", "--device", "cpu", "--out", str(out)]) == 0  # fmt: skip
    assert len(list(out.rglob("*.png"))) >= 3
    features = save_classifier(tmp_path / "features")
    words = ["--reference", toy_shards, "--features", features, "--num-samples", "8", "--metrics", "fid"]
    words += ["--min-samples", "2", "--device", "cpu", "--out", str(tmp_path / "evaluated")]
    assert main(["evaluate", "--checkpoint", path, *words]) == 0
    capsys.readouterr()


def test_block_diffusion_trains_in_the_two_stages_of_flashar(tmp_path: Path, toy_shards: str) -> None:
    """Stage 1 trains mask, time and head, whose targets are new; stage 2 all, the backbone at a fifth of the rate."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit(tmp_path, toy_shards, module_of("clean"), callbacks=[save], enable_checkpointing=True, max_steps=20)
    assert module.schedule == make_module().schedule
    first, second, third = (load_model(tmp_path / f"step={step}.ckpt").model.state_dict() for step in (3, 4, 5))
    roles = module.net.roles()
    assert set(roles.values()) == {"backbone", "added"}
    for name, role in roles.items():
        assert torch.equal(first[name], second[name]) == (role == "backbone"), name
        assert not name.endswith("wo.weight") or not torch.equal(second[name], third[name])
    assert [module.built_schedule.factor(role, 2) for role in ("backbone", "added")] == [0.2, 1.0]


def test_a_sharded_run_that_cannot_draw_says_so_before_it_trains(tmp_path: Path, toy_shards: str, monkeypatch) -> None:
    """Its first validation ended the training."""
    monkeypatch.setattr(BlockDiffusion, "sharded", True)
    seen = Losses()
    with pytest.raises(ValueError, match="grid_images 0"):
        fit(tmp_path, toy_shards, module_of("clean", validation=ValidationConfig(grid_images=3)), callbacks=[seen])
    assert not seen.seen


def test_block_diffusion_on_prompts(folder: Path, capsys, caplog, monkeypatch) -> None:
    """experiments/blockdiff_emu35.yaml in miniature: from an official directory, whose weights have no mask or time,
    to samples of prompts of several lengths and a row of the benchmark."""
    monkeypatch.chdir(folder)
    base = "data/emu35_tiny/model"
    module = FlashARModule(
        backbone=BackboneConfig(directory=base, options={"condition_dropout": 0.1}), init_from=base,
        block_diffusion=BlockDiffusionConfig(strategy="sub4x4", clean_context=True, steps=2),
    )  # fmt: skip
    save = ModelCheckpoint(folder, filename="blocks", every_n_train_steps=2)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = fit(folder, "data/emu35_tiny/shards", module, data={"prompts": base}, callbacks=[save], max_steps=2,
                     enable_checkpointing=True, limit_val_batches=1)  # fmt: skip
    dim = module.net.backbone.dim
    assert module.schedule.stage1_share == 0.2
    assert f" 0 cloned into the vertical branch, {dim + 2 * dim * (dim + 1):,} new" in caplog.text
    assert all(parameter.isfinite().all() for parameter in module.net.parameters())
    (folder / "prompts.txt").write_text("a red square\na blue circle seen from far away\n")
    words = ["--checkpoint", "blocks.ckpt", "--cfg-scale", "2", "--device", "cpu"]
    drawing = ["--assets", base, "--tokenizer", "ibq:data/emu35_tiny/tokenizer", "--prompts", "prompts.txt"]
    assert main(["generate", *words, *drawing, "--num-images", "1", "--out", "drawn"]) == 0
    assert len(list((folder / "drawn").rglob("0*.png"))) == 2
    assert main(["benchmark", *words, "--batch-sizes", "1", "--repeats", "1", "--out", "timed"]) == 0
    assert "| blocks |" in capsys.readouterr().out


def test_nar_trains_on_the_averaged_logits_alone(tmp_path: Path, toy_shards: str) -> None:
    """The model of experiments/nar_llamagen.yaml in miniature; its official weights are NAR's."""
    nar = FlashARConfig(branch_layer=2, vertical_layers=1, fusion="average", corner="fused")
    module = fit(tmp_path, toy_shards, make_module(flashar=nar, aux_weight=0.0), max_steps=2)
    assert module.net.method == "NAR"
    losses = module.net.loss(torch.randint(0, 8, (2, 4, 4)), torch.tensor([0, 1]), aux_weight=module.aux_weight)
    torch.testing.assert_close(losses["loss"], losses["fused"])
    assert "medusa_output.weight" in module.net.to_nar()


def test_validation_measures_the_same_twice(toy_shards: str) -> None:
    """The noise of a validation is fixed, and takes nothing from the generator of the training."""
    module = module_of("clean")
    module.configure_model()
    codes, classes = torch.randint(0, 8, (4, 4, 4)), torch.tensor([0, 1, 2, 0])
    valid = torch.tensor([True, True, True, False])
    state = torch.get_rng_state()
    net = module.net.eval()
    with torch.no_grad():
        first, second = (net.loss(codes, classes, valid=valid) for _ in range(2))
    assert torch.equal(first["nll"], second["nll"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first["loss"], first["nll"][:3].sum() / 48)
    assert not torch.equal(net.train().loss(codes, classes)["nll"], net.loss(codes, classes)["nll"])


def test_one_method_at_most() -> None:
    with pytest.raises(ValueError, match=r"model\.flashar and model\.par are given"):
        make_module(flashar=FlashARConfig(branch_layer=1), par=PARConfig())
    with pytest.raises(ValueError, match="no square"):
        make_module(flashar=False, par=PARConfig(tokens_per_step=5)).configure_model()


def test_another_method_is_named(tmp_path: Path) -> None:
    """PAR's head predicts another cell than a raster model's: FlashAR must not start from it."""
    par = module_of("par")
    par.configure_model()
    save_model(tmp_path / "par", par.net, Description(model=par.net.config(), grid=(4, 4)))
    for module in (make_module(init_from=str(tmp_path / "par")), module_of("clean", init_from=str(tmp_path / "par"))):
        module.configure_model()
        with pytest.raises(ValueError, match="is a PAR model"):
            module.load_initial_weights()
