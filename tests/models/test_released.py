"""Import of the authors' Emu3.5-FlashAR checkpoints against recorded outputs of their code."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.description import Description, build_model
from flashar_pl.checkpoints.initialise import initialise
from flashar_pl.checkpoints.official import official_weights
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.decoding import generate
from flashar_pl.models import FlashAR
from flashar_pl.models.released import ReleasedFlashAR

GOLDEN = Path(__file__).parents[1] / "golden" / "flashar"
CHECKPOINT = GOLDEN / "emu_flashar_tiny"
IO = load_file(GOLDEN / "emu_flashar_tiny_io.safetensors")
OFFSET = 128
CASES = ["c1_4x4", "c2_3x5"]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def inputs(case: str) -> tuple[Tensor, list[Tensor]]:
    return IO[f"{case}/in/image_ids"] - OFFSET, list(IO[f"{case}/in/prefix_ids"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint as three shards with an index."""
    directory = tmp_path_factory.mktemp("released") / "sharded"
    directory.mkdir()
    shutil.copyfile(CHECKPOINT / "config.json", directory / "config.json")
    tensors = load_file(CHECKPOINT / "model.safetensors")
    weight_map = {key: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({key: value for key, value in tensors.items() if weight_map[key] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture(scope="module", params=["single", "sharded"])
def model(request: pytest.FixtureRequest, sharded: Path) -> FlashAR:
    return FlashAR.from_released(CHECKPOINT if request.param == "single" else sharded).eval()


@pytest.fixture(scope="module")
def visual() -> ReleasedFlashAR:
    """What decoding uses: the visual rows of both heads."""
    model = FlashAR.from_released(CHECKPOINT, heads="visual").eval()
    assert isinstance(model, ReleasedFlashAR)
    assert model.dual_head.horizontal.out_features == 384
    return model


def edited(tmp_path: Path, **changes: object) -> Path:
    """The checkpoint with other values in config.json."""
    directory = tmp_path / "edited"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").symlink_to(CHECKPOINT / "model.safetensors")
    values = json.loads((CHECKPOINT / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))
    return directory


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_gate_and_losses(model, case):
    """Full heads: logits are those of the visual codes, losses are normalised over the whole vocabulary."""
    codes, prefix = inputs(case)
    with torch.no_grad():
        out, losses = model(codes, prefix), model.loss(codes, prefix)
    for got, name in ((out.horizontal, "logits_h"), (out.vertical, "logits_v"), (out.fused, "logits_fused")):
        torch.testing.assert_close(got, IO[f"{case}/out/{name}"][..., OFFSET:], **TOLERANCE)
    for gate in (out.gate, losses["gate"]):
        torch.testing.assert_close(gate, IO[f"{case}/out/gate"], atol=1e-5, rtol=0)
    for ours, name in (("fused", "loss_fuse"), ("horizontal", "loss_h"), ("vertical", "loss_v")):
        torch.testing.assert_close(losses[ours], IO[f"{case}/out/{name}"], **TOLERANCE)


COLLAPSE = {"c1_4x4": 0.1565111, "c2_3x5": 0.3472055}
"""Their loss on these inputs, computed with their code."""


@pytest.mark.parametrize("case", CASES)
def test_gate_collapse_is_the_authors_and_moves_the_gate_alone(model, case):
    """Guards an entropy in nats, border cells that count, and gradients that reach the states."""
    codes, prefix = inputs(case)
    plain, more = (model.loss(codes, prefix, gate_collapse=weight)["loss"] for weight in (0.0, 0.1))
    assert float(more - plain) * 10 == pytest.approx(COLLAPSE[case], abs=1e-4)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (plain, more)]
    moved = {
        name for name, a, b in zip(names, *grads, strict=True)
        if a is not None and not torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    }  # fmt: skip
    assert moved
    assert all(name.startswith("dual_head.gate.") for name in moved)


@pytest.mark.parametrize("case", CASES)
def test_greedy_and_guided_codes(model, visual, case):
    """Guidance with a shorter, equal and longer unconditional prefix: positions start after the longer one."""
    codes, prefix = inputs(case)
    grid = tuple(codes.shape[1:])
    for net in (model, visual):
        assert torch.equal(generate(net, prefix, grid, greedy=True)[0] + OFFSET, IO[f"{case}/out/greedy_tokens"])
        for length in ("short", "equal", "long"):
            null = list(IO[f"{case}/in/uncond_{length}_ids"])
            made = generate(net, prefix, grid, greedy=True, cfg_scale=3.0, unconditional=null)
            assert torch.equal(made[0] + OFFSET, IO[f"{case}/out/cfg3_{length}_tokens"]), length


def test_branch_layer_comes_from_the_config(tmp_path):
    """m + k < L: weights alone cannot tell m."""
    model = FlashAR.from_released(edited(tmp_path, vertical_start_layer=1)).eval()
    assert (model.branch_layer, model.vertical_layers) == (1, 2)
    codes, prefix = inputs("c1_4x4")
    with torch.no_grad():
        out, losses = model(codes, prefix), model.loss(codes, prefix)
    torch.testing.assert_close(out.fused, IO["c1_4x4/extra_m1/logits_fused"][..., OFFSET:], **TOLERANCE)
    torch.testing.assert_close(out.gate, IO["c1_4x4/extra_m1/gate"], atol=1e-5, rtol=0)
    for ours, name in (("fused", "loss_fuse"), ("horizontal", "loss_h"), ("vertical", "loss_v")):
        torch.testing.assert_close(losses[ours], IO[f"c1_4x4/extra_m1/{name}"], **TOLERANCE)


def test_visual_heads_give_the_same_logits(model, visual):
    codes, prefix = inputs("c2_3x5")
    with torch.no_grad():
        torch.testing.assert_close(visual(codes, prefix).fused, model(codes, prefix).fused)
        assert visual.loss(codes, prefix)["fused"] < model.loss(codes, prefix)["fused"]  # fewer competitors


# --- batches --------------------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch_mates(visual):
    """Three prompts and null prompts of different lengths: the authors' padding is per pair, ours hides all padding."""
    prefixes = [IO["c1_4x4/in/prefix_ids"][0], IO["c2_3x5/in/prefix_ids"][0], IO["c1_4x4/in/uncond_short_ids"][0]]
    nulls = [IO["c1_4x4/in/uncond_long_ids"][0], IO["c1_4x4/in/uncond_short_ids"][0], IO["c2_3x5/in/prefix_ids"][0]]
    assert len({len(ids) for ids in prefixes}) == 3
    wide = copy.deepcopy(visual).double()
    for settings in ({"greedy": True}, {"seeds": [5, 6, 7]}):
        together = generate(wide, prefixes, (3, 4), cfg_scale=3.0, unconditional=nulls, **settings)
        for i in range(3):
            own = {"seeds": [5 + i]} if "seeds" in settings else settings
            alone = generate(wide, prefixes[i : i + 1], (3, 4), cfg_scale=3.0, unconditional=nulls[i : i + 1], **own)
            assert torch.equal(together[i], alone[0])
    codes = generate(wide, prefixes, (3, 4), greedy=True)
    with torch.no_grad():
        together = wide(codes, prefixes).fused
        for i in range(3):
            torch.testing.assert_close(together[i], wide(codes[i : i + 1], prefixes[i : i + 1]).fused[0])
        assert torch.equal(together.argmax(-1), codes)  # cached steps are the full forward


def test_guidance_for_the_first_cells_only(visual):
    """The unconditional rows are dropped on the way, with their positions."""
    prefix, null = list(IO["c1_4x4/in/prefix_ids"]), list(IO["c1_4x4/in/uncond_long_ids"])
    some = generate(visual, prefix, (4, 4), greedy=True, cfg_scale=3.0, unconditional=null, cfg_interval=2)
    full = generate(visual, prefix, (4, 4), greedy=True, cfg_scale=3.0, unconditional=null)
    first = torch.tensor([0, 1, 4])  # 0, 1 and 1 cells decoded before them
    assert torch.equal(some.flatten()[first], full.flatten()[first])
    assert not torch.equal(some, full)


# --- the conventions ------------------------------------------------------------------------------------------------


def test_setting_travels_with_the_model(visual, tmp_path):
    """Through our own directory and through the config alone."""
    save_model(tmp_path / "ours", visual, Description(model=visual.config()))
    again = load_model(tmp_path / "ours").model.eval()
    assert isinstance(again, ReleasedFlashAR)
    codes, prefix = inputs("c1_4x4")
    with torch.no_grad():
        torch.testing.assert_close(again(codes, prefix).fused, visual(codes, prefix).fused, **TOLERANCE)
    assert again.config() == visual.config() == build_model(visual.config()).config()
    assert visual.config()["corner"] == "released"
    earlier = {"vertical_sees_prefix": False, "corner_gate": True, "row_gap": False, "pair_padding": True}
    assert build_model({**visual.config(), "compatibility": earlier}).config() == visual.config()


def test_roles_and_gradients():
    """Every parameter has a role and takes part in the loss, the corner gate included."""
    model = FlashAR.from_released(CHECKPOINT, heads="visual")
    codes, prefix = inputs("c1_4x4")
    model.loss(codes, prefix)["loss"].backward()
    roles = model.roles()
    assert roles["dual_head.corner_gate.out.weight"] == roles["dual_head.gate.hidden.weight"] == "gate"
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_raster_plan_keeps_the_pretrained_layout(visual):
    """Row-end tokens need a position of their own: two cells must not share one."""
    plan = visual.make_plan("raster", 3, 4)
    cos, sin = visual.rope(plan, visual.backbone.prefix(list(IO["c1_4x4/in/prefix_ids"]))).unbind(-1)
    position = torch.atan2(sin, cos)[0, 11:, 0]
    steps = torch.remainder(position[1:] - position[:-1], 2 * torch.pi)
    torch.testing.assert_close(steps, torch.ones_like(steps))
    assert generate(visual, list(IO["c1_4x4/in/prefix_ids"]), (3, 4), plan="raster", seeds=0).shape == (1, 3, 4)


# --- files ----------------------------------------------------------------------------------------------------------


def test_export_is_bit_exact(visual):
    official = load_file(CHECKPOINT / "model.safetensors")
    for made in (official_weights(FlashAR.from_released(CHECKPOINT)), official_weights(visual, source=CHECKPOINT)):
        assert made.keys() == official.keys()
        assert all(torch.equal(made[key], official[key]) for key in official)
    with pytest.raises(ValueError, match="source=DIR"):
        official_weights(visual)


def test_load_and_initialise_by_path(visual):
    loaded = load_model(CHECKPOINT)
    assert isinstance(loaded.model, ReleasedFlashAR)
    assert loaded.model.backbone.config.heads == "visual"
    fresh = build_model(visual.config())
    report = initialise(fresh, CHECKPOINT)
    assert report.loaded == sum(p.numel() for p in visual.parameters())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), visual.state_dict().values()))
    ours = FlashAR(build_model(visual.config()).backbone, 2)
    with pytest.raises(ValueError, match="authors' conventions"):
        initialise(ours, CHECKPOINT)


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type 'Emu3'"):
        FlashAR.from_released(edited(tmp_path / "a", model_type="Emu3"))
    with pytest.raises(ValueError, match="at least one vertical layer"):
        FlashAR.from_released(edited(tmp_path / "b", use_vertical_block=False))
    with pytest.raises(ValueError, match=r"missing keys \(vertical_block.2"):
        FlashAR.from_released(edited(tmp_path / "c", vertical_layers=3, vertical_start_layer=1))
    llamagen = LlamaGen(LlamaGenConfig(dim=16, n_layer=1, n_head=2, vocab_size=8, num_classes=2))
    with pytest.raises(ValueError, match=r"llamagen backbone has no one-dimensional positions"):
        ReleasedFlashAR(llamagen, 0, 1)


def test_names_of_earlier_versions_are_tolerated(tmp_path):
    """A `module.` prefix, an unused parameter and a head bias of zeros; a bias with values changes the logits."""
    directory = edited(tmp_path)
    tensors = {f"module.{key}": value for key, value in load_file(CHECKPOINT / "model.safetensors").items()}
    tensors |= {"module.fuse_h_logit": torch.zeros(1), "vertical_head.bias": torch.zeros(512)}
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    codes, prefix = inputs("c1_4x4")
    with torch.no_grad():
        fused = FlashAR.from_released(directory).eval()(codes, prefix).fused
    torch.testing.assert_close(fused, IO["c1_4x4/out/logits_fused"][..., OFFSET:], **TOLERANCE)
    save_file({**tensors, "vertical_head.bias": torch.ones(512)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown keys \(vertical_head.bias\)"):
        FlashAR.from_released(directory)


@pytest.mark.parametrize("start", [-1, None])
def test_branch_layer_default(tmp_path, start):
    """-1, or a config.json that does not say: the last vertical_layers layers."""
    assert FlashAR.from_released(edited(tmp_path, vertical_start_layer=start)).branch_layer == 2
