"""Official LlamaGen and NAR weights in and out: exact both ways, strict both ways."""

import pytest
import tiny
import torch
from tiny import llamagen_golden

from flashar_pl.backbones import LlamaGen, TextFeatures
from flashar_pl.models import FlashAR

NAMES = ["gpt_c2i_tiny", "gpt_c2i_gqa_tiny", "gpt_t2i_tiny"]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_exact(name: str) -> None:
    state, _ = llamagen_golden(name)
    assert_same(LlamaGen.from_official(state, n_head=4).to_official(), state)


def test_round_trip_survives_a_flashar_model_that_owns_the_head() -> None:
    state, _ = llamagen_golden("gpt_c2i_tiny")
    model = FlashAR(LlamaGen.from_official(state, n_head=4), branch_layer=2)
    assert_same(model.backbone.to_official(), state)  # type: ignore[operator]


def test_nar_round_trip_is_bit_exact() -> None:
    state, _ = llamagen_golden("nar_tiny")
    assert_same(FlashAR.from_nar(state, n_head=4).to_nar(), state)


def test_only_nar_shaped_models_are_written_as_nar() -> None:
    with pytest.raises(ValueError, match=r"branches at layer 1 of 2 .* fusion 'gate'"):
        tiny.flashar().to_nar()


def test_imported_weights_are_copies() -> None:
    """Training a model must not change the state dict it came from."""
    state, _ = llamagen_golden("gpt_c2i_tiny")
    model = LlamaGen.from_official(state, n_head=4)
    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_same(state, before)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_wrapper_prefixes_are_tolerated(wrapper: str) -> None:
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    model = LlamaGen.from_official({wrapper + key: value for key, value in state.items()}, n_head=4)
    assert_same(model.to_official(), state)


def test_tables_and_caches_of_old_files_are_dropped() -> None:
    state, _ = llamagen_golden("gpt_c2i_gqa_tiny")
    extra = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    extra["causal_mask"] = torch.ones(2, 2)
    assert_same(LlamaGen.from_official({**state, **extra}, n_head=4).to_official(), state)


def test_missing_unknown_and_misshapen_keys_are_named() -> None:
    state, _ = llamagen_golden("gpt_c2i_tiny")
    without = {key: value for key, value in state.items() if key != "layers.1.ffn_norm.weight"}
    with pytest.raises(ValueError, match=r"1 missing keys \(layers.1.ffn_norm.weight\); no unknown keys"):
        LlamaGen.from_official(without, n_head=4)
    with pytest.raises(ValueError, match=r"no missing keys; 1 unknown keys \(head.bias\)"):
        LlamaGen.from_official({**state, "head.bias": state["norm.weight"]}, n_head=4)
    with pytest.raises(ValueError, match=r"output.weight has shape \(128, 63\).*\(128, 64\)"):
        LlamaGen.from_official({**state, "output.weight": state["output.weight"][:, :-1]}, n_head=4)
    with pytest.raises(ValueError, match=r"missing keys \(tok_embeddings.weight"):
        LlamaGen.from_official({"weight": torch.zeros(2)}, n_head=4)
    skipped = {key.replace("layers.1.", "layers.9."): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"layers are numbered \[0, 2, 3, 9\]; expected 0 to 3"):
        LlamaGen.from_official(skipped, n_head=4)
    no_condition = {key: value for key, value in state.items() if not key.startswith("cls_embedding")}
    with pytest.raises(ValueError, match="neither a class table nor a caption projection"):
        LlamaGen.from_official(no_condition, n_head=4)


@pytest.mark.parametrize("n_head", [0, 3, 7])
def test_a_wrong_number_of_heads_is_named(n_head: int) -> None:
    state, _ = llamagen_golden("gpt_c2i_tiny")
    with pytest.raises(ValueError, match=f"n_head is {n_head}; expected a divisor of the width 64"):
        LlamaGen.from_official(state, n_head=n_head)


def test_sizes_are_read_from_the_tensors() -> None:
    config = LlamaGen.from_official(llamagen_golden("gpt_c2i_gqa_tiny")[0], n_head=4, rope_base=50.0).config
    assert (config.dim, config.n_layer, config.n_kv_head, config.vocab_size) == (64, 2, 2, 128)
    assert (config.num_classes, config.rope_base) == (10, 50.0)
    text = LlamaGen.from_official(llamagen_golden("gpt_t2i_tiny")[0], n_head=4).config
    assert (text.condition, text.caption_dim, text.n_layer, text.caption_positions) == ("text", 32, 3, 120)


def test_the_length_of_the_null_caption_is_read_from_the_tensors() -> None:
    """Guards against taking every text-conditional model for one of 120 caption positions."""
    state, _ = llamagen_golden("gpt_t2i_tiny")
    state["cls_embedding.uncond_embedding"] = torch.randn(16, 32)
    short = LlamaGen.from_official(state, n_head=4)
    assert torch.equal(short.to_official()["cls_embedding.uncond_embedding"], state["cls_embedding.uncond_embedding"])
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert short.raster_logits(codes, TextFeatures(torch.randn(1, 16, 32))).shape == (1, 2, 2, 128)
    with pytest.raises(ValueError, match="17 positions of width 32; expected at most 16 of width 32"):
        short.raster_logits(codes, TextFeatures(torch.randn(1, 17, 32)))


def test_a_raster_checkpoint_is_no_nar_checkpoint() -> None:
    state, _ = llamagen_golden("gpt_c2i_tiny")
    with pytest.raises(ValueError, match="holds LlamaGen weights; expected NAR"):
        FlashAR.from_nar(state, n_head=4)
    nar, _ = llamagen_golden("nar_tiny")
    with pytest.raises(ValueError, match="holds NAR or LlamaGen-FlashAR weights; expected LlamaGen"):
        LlamaGen.from_official(nar, n_head=4)
