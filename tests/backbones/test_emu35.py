"""The Emu3.5 backbone against recorded outputs of the official code, and its conditions, positions and padding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashar_pl.backbones import Emu35, Emu35Config, build_backbone
from flashar_pl.decoding import generate
from flashar_pl.grid import ROW_END, diagonal_plan, raster_plan
from flashar_pl.sampling import guide, probabilities

GOLDEN = Path(__file__).parents[1] / "golden" / "emu35"
DESCRIPTION = json.loads((GOLDEN / "emu_tiny.json").read_text())
RASTER = DESCRIPTION["raster"]
IDS = RASTER["special_ids"]
CONFIG = {**DESCRIPTION["config"], "eol_token_id": IDS["EOL"], "eoi_token_id": IDS["EOI"], "boi_token_id": IDS["BOI"]}
OFFSET = IDS["EOI"] + 1


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "emu_tiny_io.safetensors")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "emu_tiny_state.safetensors")


@pytest.fixture(scope="module", params=["full", "visual"])
def model(request: pytest.FixtureRequest, state: dict[str, torch.Tensor]) -> Emu35:
    return Emu35.from_official(state, CONFIG, heads=request.param).eval()


def toy(**overrides: object) -> Emu35:
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "ffn_dim": 48, "vocab_size": 60}
    ids = {"visual_token_offset": 20, "eol_token_id": 3, "boi_token_id": 4}
    backbone = Emu35(Emu35Config(**{**sizes, "rope_base": 1e4, "norm_eps": 1e-6, **ids, **overrides}))  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        parameter.data.mul_(8.0)  # far from uniform, so that a wrong key or position shows
    return backbone.eval()


PREFIXES = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9]), torch.tensor([4, 9])]


# --- parity ---------------------------------------------------------------------------------------------------------


def test_token_logits_match_the_official_model(state, golden):
    """Guards qk-norm, half-split RoPE, grouped queries, and the padding of shorter rows in a batch."""
    model = Emu35.from_official(state, DESCRIPTION["config"]).eval()
    masks = golden["attention_mask"].bool()
    ids = [row[mask] for row, mask in zip(golden["input_ids"], masks)]
    assert len(ids[0]) != len(ids[1])
    logits = model.token_logits(ids)
    for got, want, mask in zip(logits, golden["logits"], masks):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_token_logits_match_qwen3(state, golden):
    """The architecture is that of Qwen3 with other sizes."""
    transformers = pytest.importorskip("transformers")
    config = DESCRIPTION["config"]
    oracle = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **{**config, "attention_dropout": 0.0, "pad_token_id": None},
            attention_bias=False,
            tie_word_embeddings=False,
        )
    ).eval()
    oracle.load_state_dict(state)
    ids = golden["input_ids"][:1, 3:20]
    (got,) = Emu35.from_official(state, config).eval().token_logits(list(ids))
    with torch.no_grad():
        torch.testing.assert_close(got, oracle(ids).logits[0], atol=1e-4, rtol=1e-4)


def raster_golden(golden):
    """Conditional and unconditional prefixes, codes, and the steps that decode a code."""
    generated = golden["raster/generated_ids"]
    header = generated[:4]  # size digits and image token, forced
    prefix = torch.cat([golden["raster/prompt_ids"][0], header])
    null = torch.cat([golden["raster/uncond_ids"][0], torch.tensor([IDS["BOI"]]), header])
    visual = (generated >= OFFSET).nonzero().flatten()
    return prefix, null, (generated[visual] - OFFSET).view(1, *RASTER["grid"]), visual


def test_raster_decoding_with_forced_tokens(model, golden):
    """The official generate(): guided, greedy, row ends forced; one of our steps feeds a row end with its code."""
    prefix, null, codes, _ = raster_golden(golden)
    made = generate(
        model,
        [prefix],
        RASTER["grid"],
        plan="raster",
        cfg_scale=RASTER["guidance_scale"],
        top_k=RASTER["image_top_k"],
        greedy=True,
        unconditional=[null],
    )
    assert torch.equal(made, codes)


def test_raster_logits_and_probabilities_step_by_step(model, golden):
    """Each step's logits of both streams; guidance on raw visual logits keeps the official top-k set and weights."""
    prefix, null, codes, visual = raster_golden(golden)
    c, u = model.raster_logits(codes.expand(2, -1, -1), [prefix, null]).flatten(1, 2)
    torch.testing.assert_close(c, golden["raster/cond_logits"][visual, OFFSET:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(u, golden["raster/uncond_logits"][visual, OFFSET:], atol=1e-4, rtol=1e-4)
    ours = probabilities(guide(c, u, RASTER["guidance_scale"]), top_k=RASTER["image_top_k"])
    official = golden["raster/processed_scores"][visual].softmax(-1)[:, OFFSET:]
    assert torch.equal(ours > 0, official > 0)
    torch.testing.assert_close(ours, official, atol=1e-6, rtol=1e-4)


# --- padding and positions ------------------------------------------------------------------------------------------


def test_batch_mates_do_not_change_a_sample():
    """Padding on the left is hidden, and every row counts positions from its own prefix."""
    backbone = toy().double()
    codes = torch.randint(0, 40, (3, 2, 3), generator=torch.Generator().manual_seed(1))
    together = backbone.raster_logits(codes, PREFIXES)
    for i, prefix in enumerate(PREFIXES):
        torch.testing.assert_close(together[i : i + 1], backbone.raster_logits(codes[i : i + 1], [prefix]))


def test_positions_are_those_of_pretraining():
    """n + row (W + 1) + column; the row end takes column W. Read back from the angle of the fastest pair."""
    backbone = toy()
    prefix = backbone.prefix(PREFIXES[:2])
    assert prefix.lengths.tolist() == [4, 7]
    for plan in (diagonal_plan(2, 3), raster_plan(2, 3, row_end=True)):
        cos, sin = backbone.rope(plan, prefix).unbind(-1)
        angle = torch.atan2(sin, cos)[..., 0]  # frequency 1: the position modulo 2 pi
        for row, n in enumerate((4, 7)):
            slots = n + plan.row * 4 + plan.column
            expected = torch.cat([torch.arange(7 - n) * 0, torch.arange(n), slots]).float()
            torch.testing.assert_close(torch.polar(torch.ones(()), angle[row]), torch.polar(torch.ones(()), expected))


def test_row_end_embeds_the_row_end_token():
    backbone = toy()
    x = backbone.embed(torch.tensor([[0, 39, ROW_END]]))
    assert torch.equal(x[0], backbone.embedding.weight[[20, 59, 3]])


def test_non_square_raster_decoding_agrees_with_teacher_forcing():
    """The cache path with row ends, padding and guidance is the full forward."""
    backbone = toy().double()
    null = [torch.tensor([1, 4, 9])] * 3
    codes = generate(backbone, PREFIXES, (2, 5), plan="raster", greedy=True, cfg_scale=2.0, unconditional=null)
    logits = guide(backbone.raster_logits(codes, PREFIXES), backbone.raster_logits(codes, null), 2.0)
    assert torch.equal(logits.argmax(-1), codes)
    assert codes.unique().numel() > 5


# --- conditions -----------------------------------------------------------------------------------------------------


def test_guidance_needs_an_unconditional_prefix():
    backbone = toy()
    with pytest.raises(ValueError, match="unconditional"):
        generate(backbone, PREFIXES, (2, 2), plan="raster", cfg_scale=2.0)
    assert generate(backbone, PREFIXES, (2, 2), plan="raster", seeds=0).shape == (3, 2, 2)


def test_caption_dropout_keeps_the_image_header():
    """A dropped prompt keeps begin-of-image, size and image token, in training only."""
    backbone = toy(condition_dropout=0.5, unconditional_prompt=(1, 2))
    assert backbone.null_prefix(PREFIXES[1]).tolist() == [1, 2, 4, 9]
    assert backbone.prefix(PREFIXES).lengths.tolist() == [4, 7, 2]
    backbone.train()
    torch.manual_seed(0)
    lengths = torch.stack([backbone.prefix(PREFIXES).lengths for _ in range(200)])
    assert set(lengths[:, 1].tolist()) == {4, 7}
    assert 0.4 < (lengths[:, 1] == 4).float().mean() < 0.6
    joined = backbone.with_unconditional(PREFIXES, None)
    assert [len(ids) for ids in joined] == [4, 7, 2, 4, 4, 4]
    with pytest.raises(ValueError, match="image begin token 4"):
        backbone.null_prefix(torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="unconditional_prompt"):
        toy(condition_dropout=0.5)


@pytest.mark.parametrize(
    ("condition", "match"),
    [
        (torch.arange(3), "list of 1-D id tensors"),
        ([torch.zeros(0, dtype=torch.int64)], "not empty"),
        ([torch.tensor([1, 60])], "range from 1 to 60"),
    ],
)
def test_bad_conditions(condition, match):
    with pytest.raises(ValueError, match=match):
        toy().raster_logits(torch.zeros(1, 2, 2, dtype=torch.int64), condition)


def test_codes_need_their_place_in_the_vocabulary(state):
    """A config.json without ids still scores text; codes and row ends say what is missing."""
    text = Emu35.from_official(state, DESCRIPTION["config"])
    with pytest.raises(ValueError, match="visual_token_offset nor eoi_token_id"):
        text.embed(torch.zeros(1, 1, dtype=torch.int64))
    no_eol = Emu35.from_official(state, {**CONFIG, "eol_token_id": None})
    with pytest.raises(ValueError, match="eol_token_id"):
        generate(no_eol, PREFIXES, (2, 2), plan="raster")


def test_dropout_acts_in_training_only():
    backbone = toy(dropout=0.3)
    first = backbone.token_logits(PREFIXES)[0]
    assert torch.equal(first, backbone.token_logits(PREFIXES)[0])
    backbone.train()
    assert not torch.allclose(first, backbone.token_logits(PREFIXES)[0])


# --- config ---------------------------------------------------------------------------------------------------------


def test_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        full, visual = (build_backbone({"preset": "emu35-34b", "heads": heads}) for heads in ("full", "visual"))
    assert sum(p.numel() for p in full.parameters()) == 34_103_460_864
    assert full.vocabulary == visual.vocabulary == visual.head.out_features == 131_072
    with pytest.raises(ValueError, match="emu35-34b"):
        Emu35.preset("emu35")
    with pytest.raises(ValueError, match="dropout"):
        Emu35.preset("emu35-34b", droput=0.1)


def test_config_round_trip():
    """A backbone is rebuilt from plain types, as they come back from JSON."""
    backbone = toy(unconditional_prompt=(1, 2), condition_dropout=0.1, heads="visual")
    again = build_backbone(json.loads(json.dumps(backbone.config_dict())))
    assert isinstance(again, Emu35)
    assert again.config == backbone.config
    with pytest.raises(ValueError, match="backbone kind is 'emu3'"):
        build_backbone({"kind": "emu3"})
