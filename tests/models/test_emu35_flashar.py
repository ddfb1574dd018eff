"""FlashAR on an Emu3.5 backbone with our own conventions, and weights streamed from official directories."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pair import Pair
from stream_two_ranks import read, write
from tiny import emu, emu_flashar
from torch import Tensor

from flashar_pl.checkpoints.description import build_model, build_on_meta
from flashar_pl.checkpoints.initialise import initialise, stream_weights
from flashar_pl.checkpoints.official import is_official_directory, read_directory
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.decoding import generate
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.sampling import guide

EMU = Path(__file__).parents[1] / "golden" / "emu35"
DESCRIPTION = json.loads((EMU / "emu_tiny.json").read_text())
IDS = {"eol_token_id": 120, "eoi_token_id": 127, "boi_token_id": 126}
PREFIXES = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9]), torch.tensor([4, 9])]
NULLS = [torch.tensor([1, 2, 3, 4, 9])] * 3


def codes_of(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden base model as a directory."""
    directory = tmp_path_factory.mktemp("official") / "emu"
    directory.mkdir()
    shutil.copyfile(EMU / "emu_tiny_state.safetensors", directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "Emu3", **DESCRIPTION["config"], **IDS}))
    return directory


# --- our conventions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["full", "visual"])
@pytest.mark.parametrize("grid", [(3, 5), (5, 2), (1, 4)])
def test_cached_steps_are_the_full_forward(heads, grid):
    """Non-square grids, padded prompts, guidance: each step's argmax is that of the teacher-forced logits."""
    model = emu_flashar(heads=heads).double()
    codes = generate(model, PREFIXES, grid, greedy=True, cfg_scale=2.0, unconditional=NULLS)
    with torch.no_grad():
        fused = guide(model(codes, PREFIXES).fused, model(codes, NULLS).fused, 2.0)
    assert fused.shape[-1] == 40
    assert torch.equal(fused.argmax(-1), codes)


def test_an_image_does_not_depend_on_its_batch_mates():
    """Conditional and unconditional rows each count positions from their own prefix."""
    model = emu_flashar().double()
    together = generate(model, PREFIXES, (2, 4), cfg_scale=2.0, unconditional=NULLS, seeds=[3, 4, 5])
    for i in range(3):
        alone = generate(model, PREFIXES[i : i + 1], (2, 4), cfg_scale=2.0, unconditional=NULLS[:1], seeds=3 + i)
        assert torch.equal(together[i], alone[0])


def test_vertical_branch_sees_the_prefix():
    """With the branch at the first layer the trunk cannot carry the prompt: only the branch's own attention can."""
    model = FlashAR(emu(), 0, vertical_layers=1).eval()
    codes = codes_of(1, 2, 3)
    other = [torch.cat([torch.tensor([12]), PREFIXES[0][1:]])]
    with torch.no_grad():
        first, second = model(codes, PREFIXES[:1]), model(codes, other)
    assert not torch.allclose(first.vertical, second.vertical)
    assert first.gate[0, 0, 0] == 1.0  # corner from the horizontal head


def test_diagonal_positions_leave_the_row_end_free():
    """Pre-trained positions are kept: cell (p, q) has the same angles under both plans."""
    model = emu_flashar()
    prefix = model.backbone.prefix(PREFIXES[:1])
    tables = []
    for name in ("diagonal", "raster"):
        plan = model.make_plan(name, 3, 4)
        tables.append(model.rope(plan, prefix)[0, 4:][plan.slot])
    assert torch.equal(*tables)


def test_loss_is_the_cross_entropy_of_the_logits():
    """Visual heads: chunked losses are normalised over the codes, and equal those of the materialised logits."""
    model = emu_flashar(heads="visual").double()
    codes = codes_of(3, 2, 5)
    with torch.no_grad():
        out, losses = model(codes, PREFIXES), model.loss(codes, PREFIXES)
    nll = torch.nn.functional.cross_entropy(out.fused.flatten(0, 2), codes.flatten(), reduction="none")
    torch.testing.assert_close(losses["fused"], nll.mean())
    torch.testing.assert_close(losses["nll"], nll.view(3, -1).sum(1))


@pytest.mark.parametrize("heads", ["full", "visual"])
def test_a_few_steps_of_training_on_a_non_square_grid(heads):
    """Every parameter gets a gradient, padding gives no NaN, and the loss falls."""
    model = emu_flashar(heads=heads, condition_dropout=0.2, unconditional_prompt=(1, 2)).train()
    codes = codes_of(3, 2, 5)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model.loss(codes, PREFIXES)["loss"]
        loss.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert idle == []
        optimiser.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.8 * values[0]


# --- official directories -------------------------------------------------------------------------------------------


def test_base_model_loads_by_its_path(official):
    model = load_model(official).model
    assert isinstance(model, RasterAR)
    assert model.backbone.config.heads == "visual"
    assert is_official_directory(official)
    assert not is_official_directory(EMU)


@pytest.mark.parametrize("heads", ["full", "visual"])
def test_post_training_starts_from_the_base_model(official, heads):
    """A FlashAR model takes backbone and head, clones its branch, keeps its own dtype, and has a new gate."""
    base = read_directory(official, heads=heads)
    config = FlashAR(base.backbone, 3).config()
    torch.manual_seed(0)
    model = build_model(config)
    report = initialise(model, official)
    base = read_directory(official, heads=heads)
    torch.testing.assert_close(model.dual_head.horizontal.weight, base.backbone.head.weight, atol=0, rtol=0)
    torch.testing.assert_close(model.dual_head.vertical.weight, base.backbone.head.weight, atol=0, rtol=0)
    torch.testing.assert_close(
        model.vertical.blocks[0].attention.wqkv.weight, base.backbone.blocks[3].attention.wqkv.weight, atol=0, rtol=0
    )
    total = sum(p.numel() for p in model.parameters())
    assert report.loaded == sum(p.numel() for p in base.parameters())
    assert report.new == sum(p.numel() for p in model.dual_head.gate.parameters())
    assert report.loaded + report.cloned + report.new == total


def test_a_raster_run_starts_from_the_base_model(official):
    base = read_directory(official, heads="visual")
    model = build_model(base.config())
    initialise(model, official)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))


def test_meta_model_is_filled_completely(official):
    """No parameter stays without values: not the clone, not the gate."""
    config = FlashAR(read_directory(official).backbone, 2).config()
    model = build_on_meta(config).to(torch.bfloat16)
    stream_weights(model, official)
    assert all(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters())
    whole = FlashAR(read_directory(official).backbone.to(torch.bfloat16), 2)
    fresh = {"dual_head.gate.hidden.weight"}
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) or name in fresh
    assert model.dual_head.gate.hidden.weight.float().std() > 0.01
    prefix = [torch.tensor([123, 126, 14, 20, 14, 125])]
    with torch.no_grad():
        assert model(codes_of(1, 4, 4), prefix).gate[0, 1, 1] == 0.5


@pytest.mark.slow
def test_two_ranks_stream_their_own_rows(pair: Pair, tmp_path: Path) -> None:
    """Sharded over two processes: values and peak memory (own shard + the largest tensor + 50 MB)."""
    write(tmp_path)
    for found in pair(read, tmp_path):
        assert found["equal"]
        assert found["meta"] == 0
        assert found["file"] > 400e6
        assert found["shard"] < 0.52 * found["all"]
        assert found["growth"] <= found["shard"] + found["largest"] + 50e6, found
