"""LoRA: a frozen backbone with trained low-rank updates, from the first step to the exported model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training_toys import CLASSES, GRID, LEVELS, OPTIONS, STEPS, BackboneConfig, Losses, fit, make_module

from flashar_pl.checkpoints.description import Description, build_model
from flashar_pl.checkpoints.llamagen import clean_official
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY
from flashar_pl.checkpoints.sharded import SafeReader
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.commands.convert import ConvertOptions, convert
from flashar_pl.decoding import generate
from flashar_pl.models.lora import ADDED, LoraConfig, adapted_layers, frozen_names, merge, without_adapters
from flashar_pl.options import ModelOptions
from flashar_pl.training.config import FlashARConfig, IntraConfig
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.sharded.strategy import ShardedStrategy
from flashar_pl.training.sharded.units import local
from flashar_pl.training.stored_config import check_same_model
from flashar_pl.training.validation import for_sampling

LORA = LoraConfig(rank=2, alpha=4, dropout=0.1)


@pytest.fixture(scope="module")
def raster(tmp_path_factory) -> str:
    """A raster model to start from, with weights that all matter."""
    module = make_module(flashar=False)
    torch.manual_seed(5)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    place = tmp_path_factory.mktemp("lora") / "raster"
    save_model(place, module.net, Description(module.net.config()))
    return str(place)


def make(raster: str, lora: LoraConfig | None = LORA, **overrides: Any) -> FlashARModule:
    return make_module(**{"lora": lora, "init_from": raster, "ema_decay": 0.9, **overrides})


def started(raster: str, lora: LoraConfig | None, **overrides: Any) -> FlashARModule:
    """A module with its first weights, without a Trainer."""
    module = make(raster, lora, ema_decay=None, **overrides)
    torch.manual_seed(0)
    module.configure_model()
    module.load_initial_weights()
    return module


CODES = torch.arange(2 * 16).view(2, *GRID) * 5 % LEVELS
CONDITION = torch.tensor([0, 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_shards: str, raster: str):
    """The uninterrupted run, with a checkpoint after every step. Stage 1 ends after step 2."""
    root = tmp_path_factory.mktemp("whole")
    losses = Losses()
    save = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit(root, toy_shards, make(raster), enable_checkpointing=True, callbacks=[losses, save])
    return root, module, losses.seen


def test_starts_as_the_base_model(raster: str) -> None:
    """B = 0; and weights read into an adapted model must land in its frozen layers and in the vertical clones."""
    plain, adapted = (started(raster, lora).net.eval() for lora in (None, LORA))
    with torch.no_grad():
        for a, b in zip(vars(plain(CODES, CONDITION)).values(), vars(adapted(CODES, CONDITION)).values()):
            assert torch.equal(a, b)
    with without_adapters(adapted):
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in adapted.named_parameters()]
        for (name, a), b in zip(plain.named_parameters(), adapted.parameters()):
            assert torch.equal(a, b) or name.startswith("dual_head.gate."), name


def test_only_the_right_parameters_move(whole, raster: str) -> None:
    """Frozen weights bit for bit as before the run, in stage 2 too; all others moved. No moments for the frozen."""
    root, module, _ = whole
    before = started(raster, LORA).net.state_dict()
    frozen, roles = frozen_names(module.net), module.net.roles()
    assert frozen == {name for name in roles if name.startswith("backbone.") and ADDED not in name}
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before[name]) == (name in frozen), name
    at_switch = torch.load(root / "step=2.ckpt", weights_only=True)["state_dict"]
    for name, role in roles.items():
        if ADDED in name or role == "horizontal_head":  # frozen in stage 1
            assert ("lora_B" in name) == (not at_switch[f"net.{name}"].any()), name
    optimiser = module.trainer.optimizers[0]
    held = sum(state["exp_avg"].numel() for state in optimiser.state.values())
    assert held == sum(p.numel() for name, p in module.net.named_parameters() if name not in frozen)
    rates = {group["role"]: group["lr"] for group in optimiser.param_groups}
    assert rates["backbone"] == pytest.approx(5 * rates["horizontal_head"])


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_continued_equals_uninterrupted(whole, raster: str, toy_shards: str, tmp_path: Path, step: int) -> None:
    """From either side of the switch of stages, bit for bit, with dropout before the updates."""
    root, module, seen = whole
    losses = Losses()
    start = make(str(tmp_path / "gone"))  # what the run once started from is not asked for again
    continued = fit(tmp_path, toy_shards, start, ckpt_path=root / f"step={step}.ckpt", callbacks=[losses])
    assert losses.seen == {s: seen[s] for s in range(step + 1, STEPS + 1)}
    for (name, a), b in zip(module.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_without_averages_continues(raster: str, toy_shards: str, tmp_path: Path) -> None:
    """There is no average then to which frozen weights could be copied."""
    path = tmp_path / "one.ckpt"
    fit(tmp_path, toy_shards, make(raster, ema_decay=None), max_steps=1).trainer.save_checkpoint(path)
    again = fit(tmp_path, toy_shards, make(raster, ema_decay=None), ckpt_path=path, max_steps=2)
    assert (again.ema, again.trainer.global_step) == (None, 2)


def test_the_frozen_part_is_not_averaged(whole, raster: str, toy_shards: str, tmp_path: Path) -> None:
    """One memory for both models, sharded ones too, and one copy in a checkpoint: 65 GB of a 34 B model. A validation
    of a continued run needs it in the averages."""
    root, module, _ = whole
    cut = fit(tmp_path, toy_shards, make(raster), strategy=ShardedStrategy("fp32"), max_steps=3)
    path = tmp_path / "cut.ckpt"
    cut.trainer.save_checkpoint(path)
    continued = fit(tmp_path, toy_shards, make(raster), path, strategy=ShardedStrategy("fp32"), max_steps=4)
    stored = torch.load(root / f"step={STEPS}.ckpt", weights_only=True)["state_dict"], SafeReader(path)
    for names in (set(stored[0]), set(stored[1].names())):
        frozen = frozen_names(module.net)
        assert not any(f"ema.{name}" in names for name in frozen)
        assert all(f"ema.{name}" in names for name in module.net.state_dict().keys() - frozen)
    read = [FlashARModule.load_from_checkpoint(each) for each in (path, root / f"step={STEPS}.ckpt")]
    assert all(torch.equal(value, read[1].state_dict()[name]) for name, value in module.state_dict().items())
    for each in (module, cut, continued, *read):
        weights = dict(each.net.named_parameters())
        for name, average in each.ema.named_parameters():
            same = local(average).data_ptr() == local(weights[name]).data_ptr()
            assert same == (name in frozen_names(each.net)), name
            assert not average.requires_grad


def test_checkpoint_is_a_plain_model(whole, monkeypatch) -> None:
    """Merged while it is read, averaged weights too, and without peft."""
    root, module, _ = whole
    path = root / f"step={STEPS}.ckpt"
    assert torch.load(path, weights_only=True)[CHECKPOINT_KEY]["lora"] == LORA.to_dict()
    monkeypatch.setitem(sys.modules, "peft", None)
    for weights, net in (("auto", module.ema), ("raw", module.net)):
        loaded = load_model(path, weights)
        assert loaded.description.lora is None
        assert loaded.model.config() == net.config()
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        with torch.no_grad():
            for a, b in zip(vars(loaded.model(CODES, CONDITION)).values(), vars(net.eval()(CODES, CONDITION)).values()):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert not torch.equal(
        loaded.model.backbone.blocks[0].attention.wo.weight, module.net.backbone.blocks[0].attention.wo.weight
    )


def raw_of(path: Path) -> ModelOptions:
    return ModelOptions(str(path), weights="raw")


def test_exports(whole, raster: str, toy_shards: str, tmp_path: Path) -> None:
    """`convert` writes a merged model that trains on as any other, and official names."""
    root, module, _ = whole
    out = convert(raw_of(root / f"step={STEPS}.ckpt"), ConvertOptions(str(tmp_path / "merged")))
    again = load_model(out).model
    assert again.state_dict().keys() == build_model(module.net.config()).state_dict().keys()
    started(str(out), LORA)
    average = FlashARConfig(branch_layer=2, vertical_layers=1, fusion="average", corner="fused")
    nar = fit(tmp_path, toy_shards, make(raster, flashar=average), max_steps=4)
    nar.trainer.save_checkpoint(tmp_path / "nar.ckpt")
    merged = load_model(tmp_path / "nar.ckpt", "raw").model
    official = convert(raw_of(tmp_path / "nar.ckpt"), ConvertOptions(str(tmp_path / "official.pt"), "official"))
    names = clean_official(torch.load(official, weights_only=True)["model"])
    assert "layers.0.attention.wqkv.weight" in names
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    read = load_model(official, n_head=2).model
    with torch.no_grad():
        torch.testing.assert_close(read(CODES, CONDITION).fused, merged(CODES, CONDITION).fused, atol=1e-6, rtol=0)


def test_bfloat16_base_under_autocast(raster: str, toy_shards: str, tmp_path: Path) -> None:
    """Frozen weights of half the size beside float32 trained ones; samples are drawn from such a model too."""
    from flashar_pl.training.config import ValidationConfig

    half = LoraConfig(rank=2, base="bf16", targets=("wqkv", "w2"))
    pictures = ValidationConfig(grid_images=2, sample_batch=2, cfg_scale=1.5)
    module = fit(
        tmp_path, toy_shards, make(raster, half, validation=pictures), max_steps=4, precision="bf16-mixed",
        limit_val_batches=1.0, val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    frozen = frozen_names(module.net)
    for name, parameter in module.net.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in frozen else torch.float32), name
    assert {s["exp_avg"].dtype for s in module.trainer.optimizers[0].state.values()} == {torch.float32}
    module.trainer.save_checkpoint(tmp_path / "half.ckpt")
    merged = load_model(tmp_path / "half.ckpt").model
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"base is bf16 and trainer.precision 32-true; expected bf16-mixed"):
        fit(tmp_path, toy_shards, make(raster, half), max_steps=1)


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_samples_of_a_mixed_run_are_drawn_in_bfloat16(raster: str, base: Any) -> None:
    """From the merged model that `generate --dtype bf16` uses; a float32 base was decoded in float32."""
    net = started(raster, LoraConfig(rank=2, alpha=4, base=base)).net
    with torch.no_grad():
        for _, _, layer in adapted_layers(net):
            layer.lora_B["default"].weight.normal_()
    copy = for_sampling(net, "bf16-mixed")
    assert {p.dtype for n, p in copy.named_parameters() if "gate" not in n} == {torch.bfloat16}
    assert {p.dtype for p in copy.dual_head.gate.parameters()} == {torch.float32}
    wanted = dict(merge(dict(net.state_dict()), net.lora))
    assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in copy.state_dict().items())
    assert generate(copy, CONDITION, GRID, seeds=0).shape == (2, *GRID)
    assert for_sampling(net, "32-true") is net


def test_sharded_with_a_bfloat16_base(raster: str, toy_shards: str, tmp_path: Path) -> None:
    """One unit of two dtypes on FSDP2, in this process: as a plain float32 run from rounded weights; it continues."""
    exact = load_model(raster)
    with torch.no_grad():
        for parameter in exact.model.parameters():
            parameter.copy_(parameter.bfloat16())
    save_model(tmp_path / "exact", exact.model, exact.description)
    runs: list[dict[int, float]] = []
    for base, sharded, checkpoint in (("fp32", False, None), ("bf16", True, None), ("bf16", True, "step=2.ckpt")):
        losses, options = Losses(), {}
        if sharded:
            options = {"strategy": ShardedStrategy("fp32"), "enable_checkpointing": True}
        save = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)] if options else []
        fit(
            tmp_path, toy_shards, make(str(tmp_path / "exact"), LoraConfig(rank=2, base=base), dropout=False),
            max_steps=5, callbacks=[losses, *save], ckpt_path=checkpoint and tmp_path / checkpoint, **options,
        )  # fmt: skip
        runs.append(losses.seen)
    whole, cut, continued = runs
    assert cut == pytest.approx(whole, abs=5e-5)  # the rate of the updates is 0.05 here
    assert continued == pytest.approx({step: cut[step] for step in (3, 4, 5)}, abs=1e-5)


def test_continues_with_its_own_lora_only(whole) -> None:
    """Another alpha has the same shapes: a run would go on as another model without an error."""
    assert LoraConfig(rank=4).scale == 1, "a small rank alone must not make updates many times as large"
    path, config = str(whole[0] / "step=3.ckpt"), whole[1].model_config
    check_same_model(path, config, LoraConfig(rank=2, alpha=4, dropout=0.5, base="bf16"))
    for other in (LoraConfig(rank=2, alpha=8), LoraConfig(rank=2, alpha=4, targets=("wo",)), None):
        with pytest.raises(ValueError, match=r"holds another model: lora \{'rank': 2, 'alpha': 4"):
            check_same_model(path, config, other)


def test_wrong_settings_are_named(raster: str, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"rank is 0, .* expected rank >= 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match=r"targets is \['qkv'\]; expected some of wqkv, wo, w13, w2"):
        LoraConfig(targets=("qkv",))
    with pytest.raises(ValueError, match=r"give model\.flashar"):
        make(raster, flashar=False)
    with pytest.raises(ValueError, match=r"init_from is null, so it would stay random"):
        make(None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'flashar-pl\[lora\]'"):
        started(raster, LORA)


@pytest.mark.parametrize("alone", [False, True], ids=["LoRA", "the head of a diagonal alone"])
def test_classes_of_ones_own_are_not_left_random(raster: str, alone: bool) -> None:
    """Their table is new, and the run trained something else only: samples of every class were of none."""
    own = BackboneConfig(options={**OPTIONS, "num_classes": CLASSES + 2})
    intra = FlashARConfig(branch_layer=1, intra=IntraConfig(alone=True))
    with pytest.raises(ValueError, match=r"another number of classes.*would stay random"):
        started(raster, None if alone else LORA, backbone=own, **({"flashar": intra} if alone else {}))
    assert started(raster, None, backbone=own).net
