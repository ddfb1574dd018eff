"""BlockDiffusion: the authors' variant against their implementation, the strong one against itself in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import CLOSE, GOLDEN
from torch import Tensor

from flashar_pl.backbones.condition import TextFeatures
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.decoding import Engine
from flashar_pl.models import RasterAR
from flashar_pl.models.baselines import PAR, BlockDiffusion
from flashar_pl.models.baselines.plans import block_plan, doubled_mask

STRATEGIES = ("mdlm", "row", "sub4x4")
CONFIG = json.loads((GOLDEN / "blockdiff" / "blockdiff_tiny.json").read_text())


def arrays_of(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / "blockdiff" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return arrays_of("blockdiff_tiny")


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    return arrays_of("blockdiff_tiny_generate")


def official(arrays: dict[str, Tensor], strategy: str = "mdlm", **options: Any) -> BlockDiffusion:
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    return BlockDiffusion.from_official(state, CONFIG, strategy, **options)


def made(strategy: str = "row", clean_context: bool = True, seed: int = 0) -> BlockDiffusion:
    torch.manual_seed(seed)
    model = BlockDiffusion(tiny.backbone(seed), strategy, clean_context)
    tiny.randomise(model, seed)
    return model.double().eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_noise_logits_and_loss(arrays: dict[str, Tensor], strategy: str) -> None:
    """The last class id is the null class."""
    model, plan = official(arrays, strategy), block_plan(8, 8, strategy)
    assert torch.equal(plan.step, arrays[f"out/{strategy}/block_id"])
    assert torch.equal(plan.mask(1, "raster"), arrays[f"out/{strategy}/attn_mask"])
    codes, classes = arrays["in/token_ids"].unflatten(1, (8, 8)), arrays["in/class_ids"]
    t, u = arrays[f"in/{strategy}/t_blocks"], arrays[f"in/{strategy}/mask_u"]
    noisy, masked = model.noise(codes, t, u)
    assert torch.equal(noisy, arrays[f"out/{strategy}/noisy_tokens"])
    assert torch.equal(masked, noisy == 64)
    by_cell = t.clamp_min(1e-5)[:, plan.step]
    logits = model.logits(noisy, classes, by_cell)
    torch.testing.assert_close(logits[[0, 2]], arrays[f"out/{strategy}/logits"], **CLOSE)
    loss = model.loss(codes, classes, t, u)["loss"]
    torch.testing.assert_close(loss, arrays[f"out/{strategy}/loss"], atol=1e-5, rtol=1e-5)


def test_gradients_and_one_time_per_sample(arrays: dict[str, Tensor]) -> None:
    model = official(arrays, "row")
    codes, classes = arrays["in/token_ids"].unflatten(1, (8, 8)), arrays["in/class_ids"]
    t, u = arrays["in/row/t_blocks"], arrays["in/row/mask_u"]
    model.loss(codes, classes, t, u)["loss"].backward()
    expected = arrays["out/row/grad/tok_embeddings.weight_mask_row"]
    torch.testing.assert_close(model.mask.weight.grad[0], expected, atol=1e-6, rtol=1e-3)
    expected = arrays["out/row/grad/t_embedder.mlp.0.weight"]
    torch.testing.assert_close(model.time.hidden.weight.grad, expected, atol=1e-6, rtol=1e-3)
    logits = model.logits(arrays["out/row/noisy_tokens"][:1], classes[:1], t[:1, 0].clamp_min(1e-5))
    torch.testing.assert_close(logits[0], arrays["out/row/logits_t_per_sample_row0"], **CLOSE)


def test_greedy_codes_after_every_call(arrays: dict[str, Tensor], drawn: dict[str, Tensor]) -> None:
    """Which cells a call reveals is recorded; a wrong time, mask, guidance or order would change some code."""
    cases = sorted({key.split("/")[1] for key in drawn if key.endswith("tokens") and "stochastic" not in key})
    assert len(cases) == 5
    for case in cases:
        strategy, steps, scale = case.split("_")
        seen: list[Tensor] = []
        codes = official(arrays, strategy).generate(
            drawn["in/class_ids"], steps=int(steps.removeprefix("steps")), cfg_scale=float(scale.removeprefix("cfg")),
            greedy=True, reveal_u=drawn.get(f"in/{case}/reveal_u"), on_step=seen.append,
        )  # fmt: skip
        assert torch.equal(torch.stack(seen), drawn[f"out/{case}/tokens_after_call"].long()), case
        assert torch.equal(codes.flatten(1), drawn[f"out/{case}/tokens"])


def test_recorded_noise(arrays: dict[str, Tensor], drawn: dict[str, Tensor]) -> None:
    """Temperature, the authors' top-p, Gumbel noise."""
    for case, steps, options in (
        ("sub4x4_steps3_cfg1.5_topp0.9_temp0.8", 3, {"cfg_scale": 1.5, "top_p": 0.9, "temperature": 0.8}),
        ("row_steps2_cfg2_topp1_temp1", 2, {"cfg_scale": 2.0}),
    ):
        seen: list[Tensor] = []
        noise = {name: drawn[f"in/stochastic_{case}/{name}"] for name in ("reveal_u", "gumbel_u")}
        model = official(arrays, case.split("_")[0])
        model.generate(drawn["in/class_ids"], steps=steps, **options, **noise, on_step=seen.append)
        assert torch.equal(torch.stack(seen), drawn[f"out/stochastic_{case}/tokens_after_call"].long()), case


def test_official_weights_come_back_bit_for_bit(arrays: dict[str, Tensor]) -> None:
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    written = official(arrays).to_official()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_post_training_starts_from_the_raster_model() -> None:
    """All its weights; time has no effect before the first step."""
    backbone = tiny.backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = BlockDiffusion(backbone, "row").eval()
    assert all(torch.equal(value, model.backbone.state_dict()[key]) for key, value in before.items())
    noisy = torch.full((2, 16), tiny.VOCABULARY)
    logits = [model.logits(noisy.unflatten(1, (4, 4)), torch.tensor([0, 1]), torch.full((2,), t)) for t in (0.1, 0.9)]
    assert torch.equal(*logits)
    assert set(model.roles().values()) == {"backbone", "added"}, "stage 1 trains what predicts: mask, time, head"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_doubled_mask_by_definition(strategy: str) -> None:
    plan = block_plan(4, 8, strategy)
    mask, block, n = doubled_mask(plan, 1), plan.slot_step.tolist(), plan.n_slots
    for i in range(2 * n + 1):
        for j in range(2 * n + 1):
            if i == 0 or j == 0:
                expected = j == 0
            else:
                (row_clean, a), (column_clean, b) = divmod(i - 1, n), divmod(j - 1, n)
                if row_clean:
                    expected = bool(column_clean) and block[b] <= block[a]
                else:
                    expected = block[b] < block[a] if column_clean else block[b] == block[a]
            assert mask[i, j] == expected


@pytest.mark.parametrize(
    ("strategy", "grid"), [("row", (5, 3)), ("sub4x4", (8, 4)), ("sub8x8", (8, 16)), ("mdlm", (3, 4))]
)
def test_the_cache_of_finished_blocks_changes_nothing(strategy: str, grid: tuple[int, int]) -> None:
    """Codes after every call, guided and drawn; as many calls of the model as without a cache."""
    model, classes = made(strategy), torch.tensor([1, 4])
    calls: list[int] = []
    model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    found = []
    for cached in (True, False):
        for options in ({"greedy": True}, {"cfg_scale": 2.5, "top_p": 0.9}):
            seen: list[Tensor] = []
            calls.clear()
            model.generate(classes, grid=grid, steps=3, seeds=5, cached=cached, on_step=seen.append, **options)
            assert len(calls) == 3 * block_plan(*grid, strategy).n_steps
            found.append(torch.stack(seen))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_a_block_sees_clean_earlier_blocks_and_no_later_ones() -> None:
    """The likelihood of a block depends on the codes before it, and not on their noise or on what comes later."""
    model, classes, clean = made("row"), torch.tensor([2]), tiny.codes(1, 3, 4)
    noisy, t = clean.clone(), torch.full((1,), 0.5)
    noisy[:, 1, ::2] = model.mask_id
    base = model.logits(noisy, classes, t, clean).view(3, 4, -1)

    def changed(tokens: Tensor, row: int) -> Tensor:
        other = tokens.clone()
        other[0, row, 1] = (other[0, row, 1] + 1) % tiny.VOCABULARY
        return other

    for row in range(3):
        moved = (model.logits(noisy, classes, t, changed(clean, row)).view(3, 4, -1) != base).flatten(1).any(1)
        assert moved.tolist() == [other > row for other in range(3)]
        moved = (model.logits(changed(noisy, row), classes, t, clean).view(3, 4, -1) != base).flatten(1).any(1)
        assert moved.tolist() == [other == row for other in range(3)]


def test_the_loss_with_clean_context_is_a_bound_per_cell() -> None:
    """sum(CE / t) over masked cells by B * N, and its gradient, from materialised logits."""
    model, classes, codes = made("sub4x4"), torch.tensor([0, 3]), tiny.codes(2, 4, 8)
    t, u = torch.rand(2, 2, dtype=torch.float64), torch.rand(2, 32, dtype=torch.float64)
    losses = model.loss(codes, classes, t, u)
    noisy, masked = model.noise(codes, t, u)
    by_cell = t[:, block_plan(4, 8, "sub4x4").step]
    logits = model.logits(noisy.view_as(codes), classes, by_cell, codes)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none")
    expected = (nll * masked / by_cell).sum(1)
    torch.testing.assert_close(losses["nll"], expected)
    torch.testing.assert_close(losses["loss"], expected.sum() / 64)
    (ours,) = torch.autograd.grad(losses["loss"], model.mask.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(expected.sum() / 64, model.mask.weight)
    torch.testing.assert_close(ours, plain)


def test_it_learns() -> None:
    """A few steps on one image: its masked codes become likely."""
    torch.manual_seed(0)
    model = BlockDiffusion(tiny.backbone(), "row", clean_context=True)
    codes, classes = tiny.codes(1, 4, 4).expand(4, -1, -1), torch.zeros(4, dtype=torch.int64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model.loss(codes, classes)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_samples_depend_on_their_seeds_alone() -> None:
    model = made()
    together = model.generate(torch.tensor([1, 3]), grid=(4, 4), steps=2, seeds=7)
    assert torch.equal(together[1:], model.generate(torch.tensor([3]), grid=(4, 4), steps=2, seeds=8))
    assert model.backbone.vocabulary > int(together.max())


def test_what_does_not_fit_is_named(arrays: dict[str, Tensor]) -> None:
    state = {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}
    for change, words in (
        ({"vocab_size": 63}, r"\(65, 48\).*expects \(64, 48\)"),
        ({"n_layer": 3}, r"missing keys.*layers\.2"),
        ({"dim": 96}, r"expects \(65, 96\)|expects \(\d+, 96\)"),
    ):
        with pytest.raises(ValueError, match=words):
            BlockDiffusion.from_official(state, CONFIG | change)
    with pytest.raises(ValueError, match="holds BlockDiffusion weights; expected PAR"):
        PAR.from_official(state, CONFIG)
    with pytest.raises(ValueError, match="holds LlamaGen weights; expected BlockDiffusion"):
        BlockDiffusion.from_official(tiny.backbone().to_official(), CONFIG)
    with pytest.raises(ValueError, match=r"'col'.*mdlm, row, sub4x4, sub8x8"):
        BlockDiffusion.from_official(state, CONFIG, "col")
    model = official(arrays, "sub4x4")
    classes = torch.tensor([0])
    for options, words in (
        ({"grid": (8, 6)}, r"8 x 6.*multiples of 4"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "reveal_u": torch.rand(4, 2, 1, 16)}, r"\(4, 2, 1, 16\).*\(4, 1, 1, 16\)"),
        ({"cached": True}, "without clean_context"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(classes, **options)
    with pytest.raises(ValueError, match="clean is given"):
        model.logits(torch.zeros(1, 64, dtype=torch.int64), classes, torch.zeros(1), torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"t has shape \(1, 3\)"):
        model.logits(torch.zeros(1, 64, dtype=torch.int64), classes, torch.zeros(1, 3))


PADDED = TextFeatures(
    torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([[True] * 3, [False, True, True]]),
)
PROMPTS = [torch.tensor([5, 9, 11, 4, 7]), torch.tensor([8, 4, 7])]


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(
    ("backbone", "condition", "scale"),
    [
        (lambda: tiny.backbone(condition="text", caption_dim=5, caption_positions=3), PADDED, 1.0),
        (lambda: tiny.emu(unconditional_prompt=(9, 9, 10, 11)), PROMPTS, 2.0),
    ],
    ids=["text", "prompts"],
)
def test_captions_and_prompts_of_any_length(backbone: Any, condition: Any, scale: float, clean: bool) -> None:
    """A caption alone, unpadded, gives the logits, loss and codes that it gives beside a longer one; drawing from the
    cache equals drawing anew; and the words count. Row ends and text rows of Emu3.5's head are no cells. (Guided text
    features lead away from as many learnt positions as there are, so padding counts there.)"""
    torch.manual_seed(0)
    model = BlockDiffusion(backbone(), "sub4x4", clean, steps=2)
    tiny.randomise(model, 0)
    model = model.double().eval()
    short = [condition[1]] if isinstance(condition, list) else TextFeatures(condition.features[1:, 1:])
    guided = {"grid": (4, 8), "cfg_scale": scale}
    drawn = model.generate(condition, seeds=[1, 2], **guided)
    assert torch.equal(drawn[1:], model.generate(short, seeds=[2], **guided))
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < model.backbone.vocabulary
    if clean:
        assert torch.equal(drawn, model.generate(condition, seeds=[1, 2], cached=False, **guided))
    noisy = torch.full((2, 4, 8), model.mask_id)
    context = (drawn,) if clean else ()
    logits = model.logits(noisy, condition, torch.ones(2), *context)
    alone = model.logits(noisy[1:], short, torch.ones(1), *(each[1:] for each in context))
    torch.testing.assert_close(logits[1:], alone, atol=1e-12, rtol=1e-10)
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    t, u = torch.full((2, 2), 0.5), torch.linspace(0, 1, 64).view(2, 32)
    nll = model.loss(drawn, condition, t, u)["nll"]
    torch.testing.assert_close(nll[1:], model.loss(drawn[1:], short, t[1:], u[1:])["nll"], atol=1e-9, rtol=1e-10)


def test_published_sizes() -> None:
    """LlamaGen's parameters, a mask token and the time embedding."""
    from flashar_pl.backbones.llamagen import PRESETS, LlamaGen

    with torch.device("meta"):
        model = BlockDiffusion(LlamaGen(PRESETS["llamagen-l"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 345_011_200
    assert sum(p.numel() for p in RasterAR(model.backbone).parameters()) == 342_910_976


def test_files_are_named_and_our_format_keeps_all_options(arrays: dict[str, Tensor], tmp_path: Path) -> None:
    """Official weights do not tell their blocks, so no command guesses them."""
    model = official(arrays, "sub4x4", clean_context=True)
    torch.save({"model": model.to_official()}, tmp_path / "official.pt")
    with pytest.raises(ValueError, match="BlockDiffusion weights"):
        load_model(tmp_path / "official.pt", n_head=3)
    save_model(tmp_path / "ours", model, Description(model=model.config()))
    again = BlockDiffusion.from_pretrained(tmp_path / "ours")
    assert again.config() == model.config()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="cfg_interval"):
        Engine(again).generate(torch.tensor([0]), (4, 4), "blocks", cfg_scale=2.0, cfg_interval=3)
    with pytest.raises(ValueError, match="its own only"):
        Engine(again).generate(torch.tensor([0]), (4, 4), "raster")
