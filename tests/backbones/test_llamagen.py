"""LlamaGen against the official implementation's outputs, its published sizes, conditions and dropouts."""

import math

import pytest
import tiny
import torch
from tiny import CLOSE, llamagen_golden

from flashar_pl.backbones import LlamaGen, LlamaGenConfig, TextFeatures, build_backbone
from flashar_pl.backbones.llamagen import PRESETS
from flashar_pl.grid import raster_plan
from flashar_pl.models import RasterAR

PUBLISHED = {
    "llamagen-b": 110_888_448,
    "llamagen-l": 342_910_976,
    "llamagen-xl": 774_699_520,
    "llamagen-xxl": 1_410_972_672,
    "llamagen-3b": 3_096_659_200,
    "llamagen-xl-t2i": 777_678_080,
}


def grid_of(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.long().unflatten(1, (8, 8))


@pytest.mark.parametrize("name", ["gpt_c2i_tiny", "gpt_c2i_gqa_tiny"])
def test_class_conditional_logits_and_loss(name: str) -> None:
    """The second model has two key/value heads for four query heads; the last class id is the null class."""
    state, arrays = llamagen_golden(name)
    model = LlamaGen.from_official(state, n_head=4).eval()
    codes, ids = grid_of(arrays["in/token_ids"]), arrays["in/class_ids"]
    assert int(ids[-1]) == model.config.num_classes
    torch.testing.assert_close(model.raster_logits(codes, ids).flatten(1, 2), arrays["out/logits"], **CLOSE)
    losses = RasterAR(model).loss(codes, ids)
    torch.testing.assert_close(losses["loss"], arrays["out/ce_loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["nll"].mean() / 64, arrays["out/ce_loss"], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def text() -> tuple[LlamaGen, dict[str, torch.Tensor], TextFeatures]:
    state, arrays = llamagen_golden("gpt_t2i_tiny")
    condition = TextFeatures(arrays["in/caption_features"], arrays["in/caption_mask"])
    return LlamaGen.from_official(state, n_head=4).eval(), arrays, condition


def test_text_conditional_logits(text: tuple[LlamaGen, dict[str, torch.Tensor], TextFeatures]) -> None:
    model, arrays, condition = text
    logits = model.raster_logits(grid_of(arrays["in/token_ids"]), condition)
    torch.testing.assert_close(logits.flatten(1, 2), arrays["out/logits"], **CLOSE)


def test_the_null_caption_keeps_the_mask(text: tuple[LlamaGen, dict[str, torch.Tensor], TextFeatures]) -> None:
    model, arrays, condition = text
    both = model.with_unconditional(condition, None)
    logits = model.raster_logits(grid_of(arrays["in/token_ids"]).repeat(2, 1, 1), both)
    torch.testing.assert_close(logits[:3].view(3, 64, -1), arrays["out/logits"], **CLOSE)
    torch.testing.assert_close(logits[3:].view(3, 64, -1), arrays["out/logits_uncond"], **CLOSE)


def test_samples_that_are_not_valid_count_nothing(text: tuple[LlamaGen, dict[str, torch.Tensor], TextFeatures]) -> None:
    model, arrays, condition = text
    assert 0 < arrays["in/valid"].sum() < 3
    losses = RasterAR(model).loss(grid_of(arrays["in/token_ids"]), condition, valid=arrays["in/valid"].bool())
    torch.testing.assert_close(losses["loss"], arrays["out/ce_loss_valid"], atol=1e-5, rtol=1e-5)
    assert losses["nll"].shape == (3,)


def test_padded_caption_positions_do_not_matter() -> None:
    """Hidden from every later position, whatever their features hold."""
    model = tiny.backbone(condition="text").double()
    condition, codes = tiny.captions([2, 5, 1]), tiny.codes(3, 3, 4)
    assert condition.mask is not None
    changed = condition.features + 7.0 * (~condition.mask)[..., None]
    torch.testing.assert_close(
        model.raster_logits(codes, TextFeatures(changed, condition.mask)), model.raster_logits(codes, condition)
    )
    full = tiny.captions([5, 5, 5])
    torch.testing.assert_close(
        model.raster_logits(codes, full), model.raster_logits(codes, TextFeatures(full.features))
    )


def test_rope_of_the_prefix_is_zero_and_of_codes_is_their_own_cell() -> None:
    """A rotation by 0 (cos = 1) instead of zeros changes every logit of the published weights."""
    state, arrays = llamagen_golden("gpt_c2i_tiny")
    model = LlamaGen.from_official(state, n_head=4)
    rope = model.rope(raster_plan(8, 8), model.eval().prefix(arrays["in/class_ids"]))
    official = arrays["dbg/freqs_cis"]
    torch.testing.assert_close(rope[0], official, atol=1e-6, rtol=0)
    assert (rope[:, 0] == 0).all()
    text_model = tiny.backbone(condition="text")
    rope = text_model.rope(raster_plan(2, 3), text_model.prefix(tiny.captions([1, 4])))
    assert (rope[:, :5] == 0).all()
    assert (rope[:, 5:, :, 0] != 0).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = build_backbone({"preset": name})
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert set(PUBLISHED) == set(PRESETS)


def test_feed_forward_width() -> None:
    assert LlamaGenConfig(dim=768, n_layer=1, n_head=12).feed_forward_dim == 2048
    assert LlamaGenConfig(dim=3200, n_layer=1, n_head=32).feed_forward_dim == 8704
    scaled = LlamaGenConfig(dim=60, n_layer=1, n_head=5, multiple_of=32, ffn_dim_multiplier=1.3)
    assert scaled.feed_forward_dim == 224, "int(1.3 * int(8 * 60 / 3)) = 208, rounded up to a multiple of 32"
    assert LlamaGenConfig(dim=60, n_layer=1, n_head=5, ffn_dim=70).feed_forward_dim == 70


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 30, "n_head": 4}, "head width must be a whole multiple of 4"),
        ({"condition": "image"}, 'expected "class" or "text"'),
        ({"token_dropout": 1.0}, "token_dropout is 1.0"),
    ],
)
def test_impossible_configs_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaGenConfig(**{"dim": 32, "n_layer": 1, "n_head": 4, **values})  # type: ignore[arg-type]


def test_a_new_model_starts_at_uniform_logits() -> None:
    torch.manual_seed(0)
    model = LlamaGen(LlamaGenConfig(dim=16, n_layer=2, n_head=2, vocab_size=19, num_classes=5)).eval()
    loss = RasterAR(model).loss(tiny.codes(2, 3, 3), tiny.classes(2))["loss"]
    assert loss.detach().item() == pytest.approx(math.log(19), abs=1e-5)
    assert float(model.blocks[0].attention.wqkv.weight.detach().std()) == pytest.approx(0.02, rel=0.15)


def test_label_dropout_has_its_rate_and_its_seed() -> None:
    model = tiny.backbone(condition_dropout=0.1)
    ids = torch.zeros(4000, dtype=torch.int64)
    null = model.condition_embedding(torch.tensor([tiny.CLASSES]))[0]

    def dropped() -> torch.Tensor:
        torch.manual_seed(3)
        return (model.prefix(ids).x == null).all(-1).flatten()

    assert not dropped().any(), "evaluation keeps every label"
    model.train()
    first = dropped()
    assert float(first.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(first, dropped())


def test_caption_dropout_keeps_the_mask() -> None:
    model = tiny.backbone(condition="text", condition_dropout=0.5).train()
    condition = tiny.captions([3] * 400)
    torch.manual_seed(0)
    prefix = model.prefix(condition)
    null = model.condition_embedding(model.condition_embedding.null[:5])  # type: ignore[union-attr, index]
    dropped = torch.isclose(prefix.x, null, atol=1e-5).flatten(1).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert prefix.mask is not None
    assert torch.equal(prefix.mask, condition.mask.bool())  # type: ignore[union-attr]
    assert (prefix.lengths == 3).all()


def test_dropouts_act_in_training_only() -> None:
    model = RasterAR(tiny.backbone(token_dropout=0.3, resid_dropout=0.0, ffn_dropout=0.0, condition_dropout=0.0))
    codes, ids = tiny.codes(2, 3, 3), tiny.classes(2)
    quiet = model(codes, ids).fused
    assert torch.equal(model(codes, ids).fused, quiet)
    assert not torch.equal(model.train()(codes, ids).fused, quiet)


def test_conditions_of_the_wrong_kind_are_named() -> None:
    by_class, by_text = tiny.backbone(), tiny.backbone(condition="text")
    features = tiny.captions([1, 2])
    codes = tiny.codes(2, 2, 2)
    for condition, message in [
        (features, "class-conditional; expected class ids .* got TextFeatures"),
        (torch.zeros(2, 1, dtype=torch.int64), r"got a tensor of shape \(2, 1\)"),
        (torch.tensor([0, tiny.CLASSES + 1]), r"class ids range from 0 to 6; expected 0 to 4 \(5 = unconditional\)"),
        (torch.zeros(3, dtype=torch.int64), "the condition has 3 samples; expected 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_class.raster_logits(codes, condition)
    for condition, message in [
        (torch.zeros(2, dtype=torch.int64), "text-conditional; expected TextFeatures"),
        (TextFeatures(torch.zeros(2, 5, 3)), f"5 positions of width 3; .* of width {tiny.CAPTION_DIM}"),
        (TextFeatures(torch.zeros(2, 121, tiny.CAPTION_DIM)), "121 positions .* at most 120"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_text.raster_logits(codes, condition)
    with pytest.raises(ValueError, match=r"expected \(B, T, C\)"):
        TextFeatures(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\); expected \(2, 4\)"):
        TextFeatures(torch.zeros(2, 4, 3), torch.ones(2, 3))


def test_right_padded_captions_are_refused() -> None:
    """Text encoders pad on the right by default; the last position, which predicts (0, 0), would be padding."""
    features = tiny.captions([2, 3])
    with pytest.raises(ValueError, match="left-padded"):
        tiny.backbone(condition="text").raster_logits(
            tiny.codes(2, 2, 2),
            TextFeatures(features.features, features.mask.flip(1)),  # type: ignore[union-attr]
        )


def test_an_unconditional_of_another_kind_or_length_is_refused() -> None:
    by_class, by_text = tiny.backbone(), tiny.backbone(condition="text")
    with pytest.raises(ValueError, match="expected the same kind"):
        by_class.with_unconditional(tiny.classes(2), tiny.captions([1, 2]))
    with pytest.raises(ValueError, match="only one has a mask"):
        by_text.with_unconditional(tiny.captions([1, 2]), tiny.captions([1, 2], masked=False))
    with pytest.raises(ValueError, match="5 positions of width 12, others 4 of 12"):
        by_text.with_unconditional(tiny.captions([1, 2]), tiny.captions([1, 2], positions=4))


def test_codes_out_of_range_are_named() -> None:
    model = tiny.backbone()
    with pytest.raises(ValueError, match="codes range from 0 to 19; expected 0 to 18"):
        model.raster_logits(torch.tensor([[[0, 19]]]), tiny.classes(1))
    with pytest.raises(ValueError, match=r"expected \(B, H, W\) integers"):
        model.raster_logits(torch.zeros(2, 4, dtype=torch.int64), tiny.classes(2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integer_codes_are_taken(dtype: torch.dtype) -> None:
    """The official samplers return int32."""
    model, codes, ids = RasterAR(tiny.backbone()), tiny.codes(2, 3, 3), tiny.classes(2)
    assert torch.equal(model.backbone.raster_logits(codes.to(dtype), ids), model.backbone.raster_logits(codes, ids))
    assert torch.equal(model.loss(codes.to(dtype), ids)["loss"], model.loss(codes, ids)["loss"])
