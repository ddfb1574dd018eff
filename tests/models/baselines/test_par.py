"""PAR against the authors' implementation, and against itself on other grids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import CLOSE, GOLDEN
from torch import Tensor

from flashar_pl.backbones import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.initialise import initialise
from flashar_pl.checkpoints.official import official_weights
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.decoding import Engine
from flashar_pl.models import FlashAR
from flashar_pl.models.baselines import PAR
from flashar_pl.models.baselines.plans import region_plan

NAMES = ("par_4x_tiny", "par_multi_tiny")


def golden(name: str, configuration: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Official state dict, the other arrays, configuration."""
    with np.load(GOLDEN / "par" / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd/")}
    return state, tensors, json.loads((GOLDEN / "par" / f"{configuration}.json").read_text())


def made(seed: int = 0, n: int = 4, **sizes: Any) -> PAR:
    torch.manual_seed(seed)
    model = PAR(tiny.backbone(seed, **sizes), n)
    tiny.randomise(model, seed)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_order_mask_and_positions(name: str) -> None:
    _, arrays, config = golden(name, name)
    n = config["ar_token_num"]
    plan = region_plan(8, 8, n)
    assert torch.equal(plan.order, arrays["dbg/order_raster_index"])
    slots = 64 + n - 1  # the plan's; the vectors have the class slot before them
    assert torch.equal(plan.mask(1), arrays["dbg/attn_mask"][: slots + 1, : slots + 1])
    cells = arrays["dbg/slot_cell"][1 : slots + 1]
    assert torch.equal(plan.cell, torch.where(cells[:, 0] < 0, -1, cells[:, 0] * 8 + cells[:, 1]))
    state, _, config = golden(name, name)
    model = PAR.from_official(state, config)
    prefix = model.prefix(model.backbone.check_condition(arrays["in/class_ids"]))
    torch.testing.assert_close(model.rope(plan, prefix)[0], arrays["dbg/freqs_cis"][: slots + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients(name: str) -> None:
    """The last class id is the null class."""
    state, arrays, config = golden(name, name)
    model = PAR.from_official(state, config)
    codes, classes = arrays["in/token_ids_raster"].unflatten(1, (8, 8)), arrays["in/class_ids"]
    logits = model.logits(codes, classes).flatten(1, 2)[[0, 3]]
    by_order = logits[:, arrays["dbg/order_raster_index"]]
    torch.testing.assert_close(by_order, arrays["out/logits"], **CLOSE)
    loss = model.loss(codes, classes)["loss"]
    torch.testing.assert_close(loss, arrays["out/ce_loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    table = model.backbone.condition_embedding.table.weight
    for weight, key in ((model.learnable.weight, "spe_tok_embeddings.special_embeddings"),
                        (table, "cls_embedding.embedding_table")):  # fmt: skip
        torch.testing.assert_close(weight.grad, arrays[f"out/grad/{key}.weight"], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_codes_and_number_of_calls(name: str) -> None:
    """With the interval guidance ends and comes back: the authors count anew in the parallel phase."""
    state, _, config = golden(name, name)
    _, arrays, _ = golden(f"{name}_generate", name)
    model = PAR.from_official(state, config)
    calls: list[int] = []
    model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    cases = sorted({key.split("/")[1] for key in arrays if key.startswith("out/")})
    assert len(cases) == 3
    for case in cases:
        scale, _, interval = case.removeprefix("cfg").partition("_interval")
        calls.clear()
        codes = model.generate(arrays["in/class_ids"], cfg_scale=float(scale), greedy=True,
                               cfg_interval=int(interval) if interval else None)  # fmt: skip
        assert torch.equal(codes.flatten(1), arrays[f"out/{case}/tokens_raster"]), case
        assert len(calls) == 19
    assert [region_plan(16, 16, n).n_steps for n in (4, 16)] == [67, 31]


def test_official_weights_come_back_bit_for_bit() -> None:
    state, _, config = golden("par_4x_tiny", "par_4x_tiny")
    written = PAR.from_official({f"module.{key}": value for key, value in state.items()}, config).to_official()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


@pytest.mark.parametrize(("grid", "n"), [((4, 6), 4), ((2, 2), 4), ((8, 4), 16), ((3, 9), 9)])
def test_cached_decoding_is_the_teacher_forced_model(grid: tuple[int, int], n: int) -> None:
    """On every grid: a wrong slot, position or mask in one of the two would show."""
    model, classes = made(n=n).double(), torch.tensor([1, 4])
    codes = model.generate(classes, grid=grid, greedy=True)
    assert torch.equal(model.logits(codes, classes).argmax(-1), codes)
    other = torch.tensor([tiny.CLASSES] * 2)
    guided = model.generate(classes, grid=grid, greedy=True, cfg_scale=2.5)
    c, u = model.logits(guided, classes), model.logits(guided, other)
    assert torch.equal((u + 2.5 * (c - u)).argmax(-1), guided)


def test_guidance_that_comes_back_uses_a_whole_cache() -> None:
    """The unconditional rows must have been fed while no step was guided."""
    model, classes = made(n=16).double(), torch.tensor([2, 0])
    codes = model.generate(classes, grid=(8, 8), greedy=True, cfg_scale=3.0, cfg_interval=5)
    c, u = model.logits(codes, classes), model.logits(codes, torch.tensor([tiny.CLASSES] * 2))
    plan = region_plan(8, 8, 16)
    steps = [t == 0 or (t - 1 <= 5 if t < 16 else (t - 16) * 16 <= 5) for t in range(plan.n_steps)]
    assert steps[6:8] + steps[15:18] == [True, False, False, True, False]
    guided = torch.tensor(steps)[plan.step].view(1, 8, 8, 1)
    assert torch.equal(torch.where(guided, u + 3.0 * (c - u), c).argmax(-1), codes)


def test_a_code_sees_no_later_step() -> None:
    """Logits of a step depend on the codes of earlier steps alone, and on all of those."""
    model, codes = made().double(), tiny.codes(1, 4, 4)
    plan = region_plan(4, 4, 4)
    before = model.logits(codes, torch.tensor([0]))
    for cell in (0, 5, 11):
        changed = codes.clone()
        changed.view(-1)[cell] = (changed.view(-1)[cell] + 1) % tiny.VOCABULARY
        moved = (model.logits(changed, torch.tensor([0])) != before).any(-1).flatten()
        assert torch.equal(moved, plan.step > plan.step[cell])


def test_samples_depend_on_their_seeds_alone() -> None:
    model = made().double()
    together = model.generate(torch.tensor([1, 3]), grid=(4, 4), seeds=7)
    alone = Engine(model).generate(torch.tensor([3]), (4, 4), "regions", seeds=8)
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ar_token_num": 5}, "spe_token_num"),
        ({"ar_token_num": 6, "spe_token_num": 5}, "no square"),
        ({"ar_token_num": 9, "spe_token_num": 8}, r"\(3, 48\).*expects \(8, 48\)"),
        ({"vocab_size": 65}, r"\(64, 48\).*expects \(65, 48\)"),
        ({"n_layer": 4}, "missing keys.*layers.3"),
        ({"block_size": 60}, "60.*square"),
        ({"model_type": "t2i"}, "t2i.*c2i"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, Any], words: str) -> None:
    state, _, config = golden("par_4x_tiny", "par_4x_tiny")
    with pytest.raises(ValueError, match=words):
        PAR.from_official(state, config | change)


def test_other_methods_are_named() -> None:
    _, _, config = golden("par_4x_tiny", "par_4x_tiny")
    for key, words in (("medusa_output.weight", "NAR"), ("tok_embeddings.weight", "LlamaGen"),
                       ("module.t_embedder.mlp.0.weight", "BlockDiffusion"), ("x", "not a PAR")):  # fmt: skip
        state = {"cls_embedding.embedding_table.weight": torch.zeros(1)} if key != "x" else {}
        with pytest.raises(ValueError, match=words):
            PAR.from_official({**state, key: torch.zeros(1)}, config)


@pytest.mark.parametrize("grid", [(8, 7), (9, 8)])
def test_grids_that_regions_do_not_divide(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        made().generate(torch.tensor([0]), grid=grid)
    with pytest.raises(ValueError, match="multiples of 2"):
        made().logits(torch.zeros(1, *grid, dtype=torch.int64), torch.tensor([0]))


def test_published_sizes() -> None:
    """LlamaGen's parameters and n - 1 more vectors."""
    with torch.device("meta"):
        model = PAR(LlamaGen(LlamaGenConfig(dim=1280, n_layer=36, n_head=20)), 16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 774_718_720


def test_files_are_read_written_and_described(tmp_path: Path) -> None:
    """An official file tells n by its learnable tokens; our own format keeps it in the description."""
    state, _, _ = golden("par_4x_tiny", "par_4x_tiny")
    torch.save({"model": state}, tmp_path / "par.pt")
    loaded = load_model(tmp_path / "par.pt", n_head=3)
    assert isinstance(loaded.model, PAR)
    assert loaded.model.tokens_per_step == 4
    save_model(tmp_path / "converted", loaded.model, loaded.description)
    again = PAR.from_pretrained(tmp_path / "converted")
    written = official_weights(again)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"PAR model, not a FlashAR"):
        FlashAR.from_pretrained(tmp_path / "par.pt", n_head=3)
    with pytest.raises(ValueError, match=r"PAR model.*expected raster weights"):
        initialise(FlashAR(loaded.model.backbone, 1), tmp_path / "converted")
